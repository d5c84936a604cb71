"""The cases of ``test_bad_input``: what a user gives, and the exit code and the one line that answers. docs/bad_input.md is made from them.

DIR stands for the directory a case works in.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabricated_run import fabricate, run_config

from sgpo_dist.checkpoint import FORMAT_VERSION, MANIFEST_NAME, CheckpointStore
from sgpo_dist.config import DataConfig, build_config
from sgpo_dist.data.loading import check_lengths, load_corpus
from sgpo_dist.data.revisions import load_revisions
from sgpo_dist.evaluate.scoring import share
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Message, Prompt
from sgpo_dist.run_directory import RunDirectory
from sgpo_dist.user_function import load_function

Made = tuple[str, ...] | Callable[[], object]
"""The arguments of the command line, or a call of the function that no command reaches without an engine."""

DEEP = "[" * 500
BIDI = "\u202e"


@dataclass(frozen=True, slots=True)
class Case:
    """``make`` prepares the directory and says what is run; ``given`` describes that for the page."""

    kind: str
    given: str
    make: Callable[[Path], Made]
    code: int
    line: str


# ---- ways to give something ----------------------------------------------------------------------------------------------------------


def setting(*overrides: str) -> Callable[[Path], Made]:
    """``plan`` with overrides on the command line."""
    return lambda root: ("plan", "--config", yaml_file(root, "seed: 1\n"), *overrides)


def yaml(text: str | bytes) -> Callable[[Path], Made]:
    """``plan`` on a YAML file of this text."""
    return lambda root: ("plan", "--config", yaml_file(root, text))


def yaml_file(root: Path, text: str | bytes) -> str:
    (root / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(root / "c.yaml")


def row(*lines: Any, name: str = "rows.jsonl") -> Callable[[Path], Made]:
    """``train`` on a file of a good row and these."""

    def make(root: Path) -> Made:
        good = json.dumps({"prompt": "Hi?", "reference": "Hello."}).encode()
        given = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (root / name).write_bytes(b"\n".join([good, *given]) + b"\n")
        return train(root, f"data.path={root}/{name}")

    return make


def train(root: Path, *overrides: str) -> tuple[str, ...]:
    return ("train", "--config", yaml_file(root, f"output_dir: {root}/runs\n"), *overrides)


def training(*overrides: str) -> Callable[[Path], Made]:
    return lambda root: train(root, *(text.replace("DIR", str(root)) for text in overrides))


def on_run(*arguments: str, spoil: Callable[[Path], object] = lambda path: None) -> Callable[[Path], Made]:
    """A command on a finished run named demo, after ``spoil`` did something to its directory."""

    def make(root: Path) -> Made:
        directory = fabricate(root)
        spoil(directory.path)
        return tuple(text.replace("DIR", str(root)) for text in arguments)

    return make


def text_file(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())


# ---- runs, checkpoints, models -------------------------------------------------------------------------------------------------------


def claimed(change: dict[str, Any], resume: str = "auto") -> Callable[[Path], Made]:
    """Claiming a known run once more with other settings."""

    def make(root: Path) -> Made:
        fabricate(root)

        def claim() -> None:
            with RunDirectory.claim(run_config(root, **change), resume):
                pass

        return claim

    return make


def second_driver(root: Path) -> Made:
    directory = fabricate(root)
    held = RunDirectory.claim(run_config(root))
    held.__enter__()
    assert directory.path.is_dir()

    def claim() -> None:
        try:
            with RunDirectory.claim(run_config(root)):
                pass
        finally:
            held.__exit__(None, None, None)

    return claim


def output_dir(given: str, spoil: Callable[[Path], object]) -> Callable[[Path], Made]:
    def make(root: Path) -> Made:
        spoil(root)
        config = build_config({"output_dir": given.replace("DIR", str(root)), "run_name": "demo"})

        def claim() -> None:
            with RunDirectory.claim(config):
                pass

        return claim

    return make


def strangers_directory(root: Path) -> None:
    (root / "out" / "demo").mkdir(parents=True)
    (root / "out" / "demo" / "thesis.tex").write_text("years of work")


def checkpoint(spoil: Callable[[Path], object]) -> Callable[[Path], Made]:
    """The checkpoint that ``--resume DIR`` names, after ``spoil``."""

    def make(root: Path) -> Made:
        store = CheckpointStore(root / "checkpoints", run_id="0" * 32)
        draft = store.begin(1)
        (draft / "state.bin").write_bytes(b"weights")
        path = store.commit(draft, 1, {})
        (root / "secret").write_bytes(b"weights")
        spoil(path)
        return lambda: store.load(path)

    return make


def manifest(**changes: Any) -> Callable[[Path], object]:
    """Other fields, and no seal: as another program or a forger would write it."""

    def spoil(path: Path) -> None:
        tree = json.loads((path / MANIFEST_NAME).read_text())
        (path / MANIFEST_NAME).write_text(json.dumps(tree | {"seal": ""} | changes))

    return spoil


def another_step(path: Path) -> None:
    text = (path / MANIFEST_NAME).read_text()
    assert '"step": 1,' in text
    (path / MANIFEST_NAME).write_text(text.replace('"step": 1,', '"step": 7,'))


def linked(path: Path) -> None:
    (path / "state.bin").unlink()
    (path / "state.bin").symlink_to(path.parents[1] / "secret")


def leads_out(path: Path) -> None:
    tree = json.loads((path / MANIFEST_NAME).read_text())
    manifest(files={"../../secret": tree["files"]["state.bin"]})(path)


def model(files: dict[str, str | bytes]) -> Callable[[Path], Made]:
    """``train`` with a model directory of these files."""

    def make(root: Path) -> Made:
        (root / "model").mkdir()
        for name, content in files.items():
            (root / "model" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return train(root, f"model.model_name_or_path={root}/model", "cluster.min_free_disk_gib=0.001")

    return make


def pickled_for_eval(root: Path) -> Made:
    model({"config.json": "{}", "pytorch_model.bin": b"\x80\x04"})(root)
    return ("eval", "--model", str(root / "model"), "--data", "orders")


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


SHAPES = safetensors(json.dumps({"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()) + bytes(64)


# ---- functions, tokens, endpoints ----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: every character is a token, none is special, the end is 0."""

    chat_template = "letters"
    eos_token_id = 0
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 read only

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(turn["content"] for turn in conversation)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))


def too_long(root: Path) -> Made:
    (root / "rows.jsonl").write_text(json.dumps({"prompt": "x" * 33, "id": "long"}) + "\n")
    corpus = load_corpus(DataConfig(path=str(root / "rows.jsonl")), 0)
    return lambda: check_lengths(corpus, PromptBook(Letters()), 32)


def no_template(root: Path) -> Made:
    (root / "model").mkdir()
    bare = Letters()
    bare.chat_template = ""
    return lambda: load_tokenizer(root / "model", loader=lambda *_, **__: bare)


def function(name: str) -> Callable[[Path], Made]:
    return lambda root: lambda: load_function(name, "improver.repair")


def ending_module(root: Path) -> Made:
    (root / "ending_module.py").write_text("import sys; sys.exit()\n")
    return lambda: load_function("ending_module:f", "improver.repair")


def fails(text: str, reference: str | None, prompt: str) -> float:
    raise RuntimeError("no\nsuch \x1b[31mgrade")


def is_nan(text: str, reference: str | None, prompt: str) -> float:
    return float("nan")


def scored(name: str) -> Callable[[Path], Made]:
    prompt = Prompt("p1", (Message("user", "Hi?"),))
    return lambda root: lambda: share(load_function(f"{__name__}:{name}", "eval.scorer"), "Hello.", prompt)


def revisions(*rows: Any) -> Callable[[Path], Made]:
    def make(root: Path) -> Made:
        (root / "r.jsonl").write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in rows))
        return lambda: load_revisions(str(root / "r.jsonl"))

    return make


def damaged_database(path: Path) -> None:
    with sqlite3.connect(path / "buffer.db") as db:
        db.execute("PRAGMA journal_mode = DELETE")
    db.close()
    (path / "buffer.db").write_bytes(b"no database at all, but long enough to look at" * 100)


LAUGHS = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(f'*{chr(97 + i)}' for _ in range(9))}]\n" for i in range(9)
)


@dataclass(frozen=True, slots=True)
class Hostile:
    """A text that a model, a user or a foreign server may write, and what a person sees of it."""

    kind: str
    text: str
    shown: str


HOSTILE: tuple[Hostile, ...] = (
    Hostile("colour", "\x1b[31mred\x1b[0m", "red"),
    Hostile("window title", "\x1b]0;owned\x07title", "title"),
    Hostile("hidden link", "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\", "here"),
    Hostile("clipboard", "\x1b]52;c;cm0gLXJmIC8=\x07copied", "copied"),
    Hostile("clear screen", "\x1b[2J\x1b[Hgone", "gone"),
    Hostile("8-bit escape", "\x9b2Jgone8", "2Jgone8"),
    Hostile("overwriting by backspace", "safe\x08\x08\x08\x08evil", "safeevil"),
    Hostile("overwriting by carriage return", "one\rtwo", "one\ntwo"),
    Hostile("reading direction", "abc\u202edcba\u2066x\u2069", "abcdcbax"),
    Hostile("invisible tag characters", "hi\U000e0041\U000e0042 there", "hi there"),
    Hostile("NUL", "nu\x00ll", "null"),
    Hostile("half a surrogate pair", "half\ud800way", "halfway"),
    Hostile("terminal markup", "[link=http://evil.example]click[/link]", "[link=http://evil.example]click[/link]"),
    Hostile("script", "<script>alert(1)</script>", "<script>alert(1)</script>"),
    Hostile("handler", '"><img src=x onerror=alert(2)>', '"><img src=x onerror=alert(2)>'),
    Hostile("template", "{{ 7 * 7 }}{% raw %}", "{{ 7 * 7 }}{% raw %}"),
    Hostile("spreadsheet formula", '=HYPERLINK("http://evil.example","x")', '=HYPERLINK("http://evil.example","x")'),
)


CASES: tuple[Case, ...] = (
    Case(
        "unknown key", "`preference.betta=0.1`", setting("preference.betta=0.1"), 2, "unknown key 'preference.betta'; did you mean 'preference.beta'?"
    ),
    Case("unknown key", "`leaner: {num_ranks: 2}` in the file", yaml("leaner: {num_ranks: 2}\n"), 2, "unknown key 'leaner'; did you mean 'learner'?"),
    Case(
        "wrong type",
        "`learner.train_batch_size=many`",
        setting("learner.train_batch_size=many"),
        2,
        "learner.train_batch_size: Input should be a valid integer, unable to parse string as an integer (got 'many')",
    ),
    Case(
        "wrong type", "`preference.total_steps=yes`", setting("preference.total_steps=yes"), 2, "preference.total_steps: must be a number, not true"
    ),
    Case(
        "wrong type",
        "`sft=3`: a value where a section belongs",
        setting("sft=3"),
        2,
        "sft is a section, not a value: write its keys below it (got 3)",
    ),
    Case("number", "`preference.beta=-0.1`", setting("preference.beta=-0.1"), 2, "preference.beta: Input should be greater than 0 (got -0.1)"),
    Case("number", "`preference.beta=.nan`", setting("preference.beta=.nan"), 2, "preference.beta: Input should be a finite number (got nan)"),
    Case(
        "number",
        "`learner.step_timeout_s=.inf`",
        setting("learner.step_timeout_s=.inf"),
        2,
        "learner.step_timeout_s: Input should be a finite number (got inf)",
    ),
    Case(
        "number",
        "`preference.total_steps=1e30`",
        setting("preference.total_steps=1e30"),
        2,
        "preference.total_steps: 1e+30 is larger than any setting can be; write a number up to 9007199254740992",
    ),
    Case(
        "number",
        "an integer of 5000 digits",
        setting("seed=" + "9" * 5000),
        2,
        "value of 'seed' is not valid YAML; correct it, or put it in quotes (got "
        "'999999999999999999999999999999999999999999999999999999999999999999999999999999…)",
    ),
    Case(
        "batch arithmetic",
        "`learner.train_batch_size=9 learner.num_ranks=2`",
        setting("learner.train_batch_size=9", "learner.num_ranks=2"),
        2,
        "learner.train_batch_size (9) must be a multiple of learner.num_ranks (2)",
    ),
    Case(
        "batch arithmetic",
        "`preference.offline_ratio=0.99`",
        setting("preference.offline_ratio=0.99"),
        2,
        "preference.offline_ratio 0.99 leaves no own pair in a batch of 8; lower it",
    ),
    Case(
        "batch arithmetic",
        "`data.max_prompt_tokens=1000`",
        setting("data.max_prompt_tokens=1000"),
        2,
        "data.max_prompt_tokens + rollout.policy.max_new_tokens (1256) exceed rollout.max_model_len (1024)",
    ),
    Case(
        "YAML",
        "ten lines of aliases that stand for 9^10 words",
        yaml(LAUGHS),
        2,
        "config file DIR/c.yaml line 2 is not valid YAML (aliases are not read: write the value out)",
    ),
    Case(
        "YAML",
        "`seed: !!python/object/apply:os.system [touch pwned]`",
        yaml("seed: !!python/object/apply:os.system ['touch pwned']\n"),
        2,
        "config file DIR/c.yaml line 1 is not valid YAML (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system')",
    ),
    Case(
        "YAML",
        "the same key twice",
        yaml("seed: 1\npreference:\n  beta: 0.1\n  beta: 0.5\n"),
        2,
        "config file DIR/c.yaml line 4 is not valid YAML (the key 'beta' stands twice: keep one)",
    ),
    Case("YAML", "a list instead of sections", yaml("- seed\n"), 2, "config file DIR/c.yaml must hold a mapping of sections"),
    Case("YAML", "Latin-1 bytes", yaml(b"run_name: caf\xe9\n"), 2, "config file DIR/c.yaml is not UTF-8 text (byte 13); save it as UTF-8"),
    Case("YAML", "500 opening brackets", yaml(DEEP), 2, "config file DIR/c.yaml is not valid YAML (nested too deep)"),
    Case("YAML", "a NUL character", yaml("run_name: a\0b\n"), 2, "config file DIR/c.yaml is not valid YAML (special characters are not allowed)"),
    Case(
        "YAML",
        "two megabytes",
        yaml("#" * 2_000_000),
        2,
        "config file DIR/c.yaml is longer than 1000000 bytes; give --config a YAML file of settings",
    ),
    Case("YAML", "a directory", lambda root: ("plan", "--config", str(root)), 2, "config file DIR cannot be read: Is a directory"),
    Case(
        "YAML",
        "an empty file and no such data",
        lambda root: ("train", "--config", yaml_file(root, ""), "data.path=none"),
        2,
        "data path 'none' is neither a built-in set (orders, chat) nor a file or directory here (No such file or directory)",
    ),
    Case(
        "run name",
        "`run_name=../../etc`",
        setting("run_name=../../etc"),
        2,
        "run_name must be 1-64 of letters, digits, '.', '_', '-' and start with a letter or digit",
    ),
    Case(
        "run name",
        "`run_name=/tmp/x`",
        setting("run_name=/tmp/x"),
        2,
        "run_name must be 1-64 of letters, digits, '.', '_', '-' and start with a letter or digit",
    ),
    Case(
        "run name",
        "`run_name=-rf`",
        setting("run_name=-rf"),
        2,
        "run_name must be 1-64 of letters, digits, '.', '_', '-' and start with a letter or digit",
    ),
    Case(
        "run name",
        "300 characters",
        setting("run_name=" + "x" * 300),
        2,
        "run_name must be 1-64 of letters, digits, '.', '_', '-' and start with a letter or digit",
    ),
    Case(
        "run name",
        "a NUL",
        yaml('run_name: "a\\0b"\n'),
        2,
        "run_name holds a line break, a control character or an invisible mark; write it without (got 'a\\x00b')",
    ),
    Case(
        "run name",
        "a line break at its end",
        yaml('run_name: "demo\\n"\n'),
        2,
        "run_name holds a line break, a control character or an invisible mark; write it without (got 'demo\\n')",
    ),
    Case(
        "run name",
        "a mark that turns the reading direction",
        setting(f"run_name=a{BIDI}b"),
        2,
        "run_name holds a line break, a control character or an invisible mark; write it without (got 'a\\u202eb')",
    ),
    Case(
        "run name",
        "a terminal escape in another command",
        lambda root: ("samples", "\x1b]0;owned\x07x\nsgpo-dist: all is well", "--runs", str(root)),
        2,
        "no run 'x sgpo-dist: all is well' here or under DIR/; no run was made here yet",
    ),
    Case(
        "path",
        "half a surrogate pair",
        yaml('output_dir: "\\ud800"\n'),
        2,
        "output_dir holds a line break, a control character or an invisible mark; write it without (got '\\ud800')",
    ),
    Case(
        "path",
        "a directory name of 5000 characters",
        training("data.path=" + "x" * 5000),
        2,
        "data path 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
        "xxxxxxxxxx…' is neither a built-in set (orders, chat) nor a file or directory here (File name too long)",
    ),
    Case(
        "path",
        "`output_dir` is a file",
        output_dir("DIR/out", lambda root: (root / "out").write_text("mine")),
        3,
        "cannot write DIR/out/demo ([Errno 20] Not a directory: 'DIR/out/demo'); free space there or set output_dir to a writable directory",
    ),
    Case(
        "path",
        "the run's directory is someone's thesis",
        output_dir("DIR/out", strangers_directory),
        2,
        "DIR/out/demo exists and is not a run directory; set run_name= or output_dir= to another place",
    ),
    Case(
        "path",
        "`output_dir` is a link to someone's thesis",
        output_dir("DIR/link", lambda root: (strangers_directory(root), (root / "link").symlink_to(root / "out"))),
        2,
        "DIR/out/demo exists and is not a run directory; set run_name= or output_dir= to another place",
    ),
    Case(
        "path",
        "`report --to` below a file",
        on_run("report", "DIR/demo", "--to", "DIR/demo/run.json/page.html"),
        3,
        "cannot write DIR/demo/run.json/page.html (Not a directory); free space there or give another --to",
    ),
    Case(
        "path",
        "`export --to` something that exists",
        on_run("export", "DIR/demo", "--to", "DIR/demo/logs"),
        2,
        "DIR/demo/logs exists already; give --to a directory that does not",
    ),
    Case(
        "data row",
        "`{broken`",
        row(b"{broken"),
        2,
        "DIR/rows.jsonl line 2: invalid JSON (Expecting property name enclosed in double quotes at column 2); each line must hold one JSON object",
    ),
    Case(
        "data row",
        "no column for the prompt",
        row({"question": "Hi?"}),
        2,
        "DIR/rows.jsonl line 2: has no column 'prompt' or 'messages'; it has 'question' (data.input_key names another column)",
    ),
    Case(
        "data row", "a number for a prompt", row({"prompt": 7}), 2, "DIR/rows.jsonl line 2: 'prompt' must be a string or a list of messages, not int"
    ),
    Case("data row", "`null` for a prompt", row({"prompt": None}), 2, "DIR/rows.jsonl line 2: the prompt is null; give it a text, or remove the row"),
    Case(
        "data row",
        "an empty list of messages",
        row({"messages": []}),
        2,
        "DIR/rows.jsonl line 2: the prompt must end with a user turn that is not empty",
    ),
    Case(
        "data row",
        "a role that is none",
        row({"messages": [{"role": "root", "content": "x"}]}),
        2,
        "DIR/rows.jsonl line 2: 'messages' message 1 must have a role (system, user, assistant) and a content string",
    ),
    Case(
        "data row",
        "20 MB in one line",
        row(b'{"prompt": "' + b"x" * 20_000_000 + b'"}'),
        2,
        "DIR/rows.jsonl line 2: the row is longer than 1000000 bytes",
    ),
    Case("data row", "Latin-1 bytes", row(b'{"prompt": "caf\xe9"}'), 2, "DIR/rows.jsonl line 2: not UTF-8 text"),
    Case(
        "data row",
        "NUL bytes",
        row(b'{"prompt": "a\x00b"}'),
        2,
        "DIR/rows.jsonl line 2: invalid JSON (Invalid control character at column 14); each line must hold one JSON object",
    ),
    Case(
        "data row",
        "half a surrogate pair",
        row(b'{"prompt": "\\ud800"}'),
        2,
        "DIR/rows.jsonl line 2: 'prompt' holds half of a surrogate pair, which is not text",
    ),
    Case(
        "data row",
        "100,000 opening brackets",
        row(b"[" * 100_000),
        2,
        "DIR/rows.jsonl line 2: invalid JSON (nested too deep); each line must hold one JSON object",
    ),
    Case(
        "data row",
        "a column named by terminal escapes",
        row({"\x1b[2J\x1b]0;owned\x07\u202eprompt": 1}),
        2,
        "DIR/rows.jsonl line 2: has no column 'prompt' or 'messages'; it has '\\x1b[2J\\x1b]0;owned\\x07\\u202eprompt' "
        "(data.input_key names another column)",
    ),
    Case(
        "data row",
        "a CSV file",
        row(name="rows.csv"),
        2,
        "data path 'DIR/rows.csv' has an unknown format; use .jsonl, .parquet or a directory of the datasets library",
    ),
    Case(
        "data row",
        "a prompt longer than the limit",
        too_long,
        2,
        "DIR/rows.jsonl line 1: prompt 'long' has 33 tokens, data.max_prompt_tokens allows 32; shorten it or raise "
        "data.max_prompt_tokens (and rollout.max_model_len)",
    ),
    Case(
        "model",
        "a directory without config.json",
        model({"model.safetensors": SHAPES}),
        2,
        "model.model_name_or_path 'DIR/model' has no config.json; give a Hugging Face model directory",
    ),
    Case(
        "model",
        "pickled weights only",
        model({"config.json": '{"hidden_size": 4}', "pytorch_model.bin": b"\x80\x04"}),
        2,
        "model.model_name_or_path 'DIR/model' has no safetensors files; convert its weights to safetensors (pickled ones are never loaded)",
    ),
    Case(
        "model",
        "pickled weights only, for `eval`",
        pickled_for_eval,
        2,
        "--model DIR/model has no safetensors files; convert its weights to safetensors (pickled ones are never loaded)",
    ),
    Case(
        "model",
        "a safetensors file with a broken head",
        model({"config.json": '{"hidden_size": 4}', "a.safetensors": safetensors(b"{oops")}),
        2,
        "model.model_name_or_path 'DIR/model' is damaged (JSONDecodeError: Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)); get the model's files again",
    ),
    Case(
        "model",
        "a config.json of other types",
        model({"config.json": '{"hidden_size": "wide"}', "a.safetensors": SHAPES}),
        2,
        "model.model_name_or_path 'DIR/model' is damaged (ValueError: invalid literal for int() with base 10: 'wide'); get the model's files again",
    ),
    Case(
        "model",
        "no chat template",
        model({"config.json": '{"hidden_size": 4, "num_attention_heads": 1}', "a.safetensors": SHAPES}),
        3,
        "model 'DIR/model' has no chat template: take an instruction-tuned model, or add a chat_template.jinja",
    ),
    Case(
        "model",
        "a tokenizer without a chat template",
        no_template,
        2,
        "model 'DIR/model' has no chat template; use an instruction-tuned model, or put a chat_template.jinja into its directory",
    ),
    Case(
        "model",
        "`model.trust_remote_code=true`",
        setting("model.trust_remote_code=true"),
        2,
        "model.trust_remote_code needs model.revision set to a commit hash (40 hex digits)",
    ),
    Case(
        "model",
        "`model.trust_remote_code=true model.revision=main`",
        setting("model.trust_remote_code=true", "model.revision=main"),
        2,
        "model.trust_remote_code needs model.revision set to a commit hash (40 hex digits)",
    ),
    Case(
        "model",
        "`rollout.engine_kwargs.trust_remote_code=true`",
        setting("rollout.engine_kwargs.trust_remote_code=true"),
        2,
        "rollout.engine_kwargs trust_remote_code needs model.trust_remote_code set to true, with a pinned model.revision",
    ),
    Case(
        "checkpoint",
        "of another program",
        checkpoint(manifest(format="deepspeed")),
        4,
        "DIR/checkpoints/step-1 was not written by sgpo_dist; move it out of the run's directory",
    ),
    Case(
        "checkpoint",
        "of another release",
        checkpoint(manifest(format_version=FORMAT_VERSION + 1)),
        4,
        "DIR/checkpoints/step-1 has checkpoint format 2, not 1; use the release that wrote it",
    ),
    Case(
        "checkpoint",
        "of another run",
        checkpoint(manifest(run_id="f" * 32)),
        4,
        "DIR/checkpoints/step-1 belongs to another run (ffffffff…); move it out of this run's directory",
    ),
    Case(
        "checkpoint",
        "its manifest names `../../secret`",
        checkpoint(leads_out),
        4,
        "checkpoint DIR/checkpoints/step-1 is damaged (../../secret leads out of the directory); use another one",
    ),
    Case(
        "checkpoint",
        "a link inside leads out",
        checkpoint(linked),
        4,
        "checkpoint DIR/checkpoints/step-1 is damaged (state.bin leads out of the directory); use another one",
    ),
    Case(
        "checkpoint",
        "a changed manifest",
        checkpoint(another_step),
        4,
        "checkpoint DIR/checkpoints/step-1 is damaged (MANIFEST.json does not fit its seal); use another one",
    ),
    Case(
        "checkpoint",
        "no manifest",
        checkpoint(lambda path: (path / MANIFEST_NAME).unlink()),
        4,
        "checkpoint DIR/checkpoints/step-1 is damaged (it has no MANIFEST.json); use another one",
    ),
    Case(
        "run directory",
        "a second driver",
        second_driver,
        2,
        "another driver (pid N) works on this run; wait for it, stop it, or set run_name= to another name",
    ),
    Case(
        "run directory",
        "another configuration",
        claimed({"seed": 1}),
        2,
        "DIR/demo belongs to a run of another configuration: seed differ; set them as before to resume it, or set run_name= to start another run",
    ),
    Case(
        "run directory",
        "fewer steps than before",
        claimed({"preference": {"total_steps": 1}}),
        2,
        "preference.total_steps is 1 but this run was asked for 2 before; it may only grow: set preference.total_steps=2 or another run_name=",
    ),
    Case(
        "run directory",
        "`--resume never` on a known run",
        claimed({}, "never"),
        2,
        "DIR/demo already holds a run and --resume never was asked; set run_name= to another name, or leave --resume out",
    ),
    Case(
        "run directory",
        "run.json is no JSON",
        on_run("status", "DIR/demo", spoil=text_file("run.json", "{")),
        4,
        "DIR/demo/run.json is damaged (ValidationError); restore it from a backup",
    ),
    Case(
        "run directory",
        "a database that is none",
        on_run("samples", "DIR/demo", spoil=damaged_database),
        4,
        "DIR/demo/buffer.db: file is not a database; put the buffer.db of the newest checkpoint in its place, delete buffer.db-wal "
        "and buffer.db-shm, and resume",
    ),
    Case(
        "run directory",
        "evaluation.json is a list, for `report`",
        on_run("report", "DIR/demo", spoil=text_file("evaluation.json", "[]")),
        4,
        "DIR/demo/evaluation.json is damaged; delete it and run the same training command again",
    ),
    Case(
        "run directory",
        "evaluation.json is a list, for `status`",
        on_run("status", "DIR/demo", spoil=text_file("evaluation.json", "[]")),
        4,
        "DIR/demo/evaluation.json is damaged; delete it and run the same training command again",
    ),
    Case(
        "run directory",
        "config.resolved.yaml is no YAML, for `report`",
        on_run("report", "DIR/demo", spoil=text_file("config.resolved.yaml", "a: [")),
        4,
        "DIR/demo/config.resolved.yaml is damaged; restore it from a backup",
    ),
    Case(
        "run directory",
        "`samples --limit -5`",
        on_run("samples", "DIR/demo", "--limit", "-5"),
        2,
        "argument --limit: '-5' is not a number from 0 (see sgpo-dist samples --help)",
    ),
    Case(
        "machine",
        "64 GPUs",
        training("learner.gpus_per_rank=64"),
        3,
        "65 GPUs asked for, N here: lower learner.num_ranks, learner.gpus_per_rank, rollout.num_rollout_workers or "
        "rollout.tensor_parallel_size, or set learner.gpus_per_rank=0 for the CPU",
    ),
    Case(
        "machine",
        "engines that ask for 8 TB of memory",
        training("rollout.kv_cache_gib=8000", "model.dtype=bfloat16"),
        3,
        "about 8010.8 GiB of memory needed, the machine has N GiB: lower learner.max_tokens_per_micro_batch, learner.num_ranks, "
        "rollout.num_rollout_workers or rollout.kv_cache_gib, or enable model.lora",
    ),
    Case(
        "machine",
        "a disk that is to keep 10 PB free",
        training("cluster.min_free_disk_gib=1e7", "model.dtype=bfloat16"),
        3,
        "about 6.3 GiB of disk needed under DIR/runs beside the 1e+07 GiB of cluster.min_free_disk_gib, N GiB is free: free space, "
        "set output_dir elsewhere, or lower checkpoint.keep_last",
    ),
    Case(
        "user function",
        "`repair` without a colon",
        setting("improver.reviser=repair", "improver.repair=json.loads"),
        2,
        "improver.reviser 'repair' needs improver.repair set to 'module:function'",
    ),
    Case(
        "user function",
        "no such module",
        function("no_such_module_here:f"),
        2,
        "improver.repair: module 'no_such_module_here' cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'",
    ),
    Case("user function", "no such function", function("json:no_such"), 2, "improver.repair: module 'json' has no function 'no_such'"),
    Case(
        "user function",
        "a path for a module",
        function("../../evil:f"),
        2,
        "improver.repair: module '../../evil' cannot be imported: TypeError: the 'package' argument is required to perform a relative "
        "import for '../../evil'",
    ),
    Case(
        "user function", "a module that ends the program", ending_module, 2, "improver.repair: module 'ending_module' cannot be imported: SystemExit:"
    ),
    Case("user function", "a scorer that raises", scored("fails"), 2, "the scorer on prompt 'p1' failed: RuntimeError: no such grade"),
    Case("user function", "a scorer that returns NaN", scored("is_nan"), 2, "the scorer on prompt 'p1' must return a finite number, not nan"),
    Case(
        "endpoint",
        "`file:///etc/passwd`",
        setting("improver.endpoint.base_url=file:///etc/passwd"),
        2,
        "improver.endpoint.base_url must be http(s)://host[:port]/path, without user, password or query",
    ),
    Case(
        "endpoint",
        "a password in the address",
        setting("improver.endpoint.base_url=https://me:hunter2hunter2@host/v1"),
        2,
        "improver.endpoint.base_url must be http(s)://host[:port]/path, without user, password or query",
    ),
    Case(
        "endpoint",
        "the key itself instead of its variable",
        setting("improver.endpoint.api_key_env=sk-abcdefghijklmnopqrstuvwx"),
        2,
        "improver.endpoint.api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, not a key",
    ),
    Case(
        "secret",
        "a token in an unknown key",
        setting("model.hf_token=hf_abcdefghijklmnopqrstuvwx"),
        2,
        "unknown key 'model.hf_token'; did you mean 'model.dtype'?",
    ),
    Case(
        "secret",
        "an unfinished quote under a secret's name",
        setting('rollout.engine_kwargs.hf_token="hunter2'),
        2,
        "value of 'rollout.engine_kwargs.hf_token' is not valid YAML; correct it, or put it in quotes (got '[hidden]')",
    ),
    Case(
        "secret",
        "a token where a number belongs",
        setting("seed=hf_abcdefghijklmnopqrstuvwx"),
        2,
        "seed: Input should be a valid integer, unable to parse string as an integer (got '[hidden]')",
    ),
    Case(
        "secret",
        "a password in an address where a run belongs",
        lambda root: ("status", "https://me:hunter2hunter2@host/demo", "--runs", str(root)),
        2,
        "no run 'https://[hidden]@host/demo' here or under DIR/; no run was made here yet",
    ),
    Case(
        "revisions file",
        "no revision in a row",
        revisions({"id": "a", "revision": "b"}, {"id": "b"}),
        2,
        "DIR/r.jsonl line 2: column 'revision' must hold a text that is not empty",
    ),
    Case(
        "revisions file",
        "no name in a row",
        revisions({"revision": "b"}),
        2,
        "DIR/r.jsonl line 1: needs a column 'id' or 'prompt' that says whose revision it is",
    ),
    Case(
        "revisions file",
        "the same prompt twice",
        revisions({"id": "a", "revision": "b"}, {"id": "a", "revision": "c"}),
        2,
        "DIR/r.jsonl line 2: the same prompt has a revision at DIR/r.jsonl line 1; keep one of them",
    ),
    Case(
        "revisions file",
        "half a surrogate pair",
        revisions('{"id": "a", "revision": "\\ud800"}'),
        2,
        "DIR/r.jsonl line 1: 'revision' holds half of a surrogate pair, which is not text",
    ),
    Case("arguments", "no command", lambda root: (), 2, "no command given (see sgpo-dist --help)"),
    Case(
        "arguments", "an option that is none", on_run("audit", "DIR/demo", "--fix"), 2, "'--fix' is not an argument of audit (see sgpo-dist --help)"
    ),
)
