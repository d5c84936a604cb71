"""What runs inside the interpreter that has alpaca_eval: one comparison, judged by any OpenAI-compatible server.

Fed to that interpreter on its standard input by ``alpaca``, with the path of a job file as its argument; it needs the package and nothing of
this project. It takes one of the package's own judge configurations, with its prompt and its parser, and changes only who is asked.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the job, let the package judge, write figures and preferences beside it."""
    configs: Path = import_module("alpaca_eval.constants").EVALUATORS_CONFIG_DIR
    evaluate, yaml = import_module("alpaca_eval.main").evaluate, import_module("yaml")
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[1]).parent
    ours = folder / job["annotator"]
    ours.mkdir()
    theirs = yaml.safe_load((configs / job["annotator"] / "configs.yaml").read_text(encoding="utf-8"))
    settings = adapted(theirs[job["annotator"]], job["completions"], configs)
    (ours / "configs.yaml").write_text(yaml.safe_dump({job["annotator"]: settings}), encoding="utf-8")
    leaderboard, annotations = evaluate(
        model_outputs=job["outputs"],
        reference_outputs=job["reference"],
        annotators_config=str(ours),
        output_path=None,
        precomputed_leaderboard=None,
        is_cache_leaderboard=False,
        is_return_instead_of_print=True,
        fn_metric=job["metric"],
        metric_kwargs=job["metric_kwargs"],
        sort_by="win_rate",
    )
    figures = {name: value for name, value in leaderboard.iloc[0].items() if isinstance(value, int | float)}
    preferences = [[row["preference"], len(row["output_2"]), len(row["output_1"])] for row in annotations]
    result = {"figures": {name: float(value) for name, value in figures.items()}, "preferences": preferences}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def adapted(settings: dict[str, Any], completions: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A judge of the package that asks our server."""
    if settings["fn_completions"] != "openai_completions":
        raise SystemExit(f"this judge asks {settings['fn_completions']}, not an OpenAI-compatible server; choose another")
    kwargs = settings["completions_kwargs"] | completions
    if "top_logprobs" in kwargs:
        kwargs["top_logprobs"] = 20  # the most that servers give: a model that is no GPT-4 ranks the two letters lower
    return settings | {"completions_kwargs": kwargs, "prompt_template": str(folder / settings["prompt_template"])}


if __name__ == "__main__":
    main()
