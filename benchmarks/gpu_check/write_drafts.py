"""Targets with drafts that are known to be right: `python write_drafts.py DIR` writes `mtp`, `eagle3`, `eagle3-draft`.

They are those of the tests, which know them; taken by path, for another package may be installed under that name.
"""

import importlib.util
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "tests" / "vllm" / "draft_models.py"
TAPS = [1, 3, 4]
"""Before these layers the EAGLE3 target has one hidden state, so the draft is right."""


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("msa_tests_draft_models", SOURCE)
    assert spec and spec.loader
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    folder.mkdir(parents=True, exist_ok=True)
    models.write_clone(folder / "mtp")
    models.write_eagle3_draft(folder / "eagle3-draft", models.write_eagle3_target(folder / "eagle3"), TAPS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
