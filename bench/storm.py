"""What ``make chaos`` trains: a model of 0.4 million parameters and prompts of its language, made in seconds into one folder.

    python -m bench.storm runs/storm-model     # MODEL/, prompts.jsonl; nothing to do when they are there

So small a model lets a whole run start, save and recover as fast as its processes can, so that an hour holds many faults. Leaves out: the faults
(``sgpo-dist chaos``) and the run's settings (examples/storm.yaml).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from bench.quality import language
from bench.quality.tiny_model import TinyModel, make_model

PROMPTS: Final = 2000
SHAPE: Final = TinyModel(rows=512, epochs=2)


def prepare(folder: Path, seed: int = 0) -> None:
    """The prompts last: where they are, all is there."""
    prompts = folder / "prompts.jsonl"
    if prompts.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", seed, SHAPE)
    draft = prompts.with_suffix(".tmp")
    rows = [{"id": row["id"], "prompt": row["prompt"], "reference": row["reference"]} for row in language.rows("bare", PROMPTS, seed)]
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)
