"""What SGLang scans for model classes: every module in here, and nothing that is none."""
