"""The tiny model and what `transformers` computes of it in fp32: `python write_truth.py DIR`, minutes on any CPU.

DIR may be carried to where no GPU should wait for it: `benchmarks/gpu_check --truth DIR`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(folder: Path) -> None:
    from engine import checkpoint, truth

    from msa_backend.tiny import write_tiny_checkpoint

    write_tiny_checkpoint(folder / "tiny", dtype="bfloat16", shards=3, overwrite=True)
    checkpoint.make_sglang_load(folder / "tiny")
    truth.write(folder / "tiny", folder / "truth.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
