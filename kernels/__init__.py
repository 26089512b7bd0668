"""MSA kernels: torch and Triton only, for any engine. ``api`` holds the operations."""
