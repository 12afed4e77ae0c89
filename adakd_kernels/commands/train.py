"""`adakd train`: options from a YAML file and flags, records and models from disk, then `AdaKDTrainer`."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from . import CommandError, CommandParser

try:
    from ..integrations.transformers import (
        AdaKDConfig,
        AdaKDTrainer,
        LoadedRecords,
        check_same_tokenizer,
        last_checkpoint,
        load_records,
    )
except ImportError as error:
    raise CommandError(str(error)) from error

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class RunOptions:
    """Models and data of a run."""

    student: str | None = field(default=None, metadata={"help": "Folder or hub name of the model to train. Required."})
    teacher: str | None = field(default=None, metadata={"help": "Folder or hub name of the teacher. Required."})
    train_file: str | None = field(
        default=None, metadata={"help": "JSONL with instruction, input, output, or with messages. Required."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "JSONL of the same kind to evaluate on."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a record; a longer answer loses its end."})
    student_dtype: str = field(
        default="float32",
        metadata={"help": f"Type of the student's weights: {', '.join(DTYPES)}; auto: as saved."},
    )
    teacher_dtype: str = field(default="auto", metadata={"help": "Type of the teacher's weights, likewise."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of both models, such as sdpa or flash_attention_2."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a model."})

    def __post_init__(self) -> None:
        for name in ("student", "teacher", "train_file"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --{name}, or {name} in the --config file")
        for name in ("student_dtype", "teacher_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be 2 or more, got {self.max_length}")


class _Parser(CommandParser, HfArgumentParser):
    """Options from the fields of dataclasses."""


class _Started(TrainerCallback):
    """Whether a step has begun: an error before the first one comes from the checkpoint, a later one from training."""

    started = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = True


def run(argv: list[str]) -> int:
    """Train, save the model and its tokenizer in `output_dir`, and print a line of metrics.

    Raises:
        CommandError: options, data, models or a checkpoint that cannot be used.
    """
    options, config = parse(argv)
    code = _train(options, config)
    # The trainer must be gone before the process group is destroyed. Otherwise DistributedDataParallel is the last to
    # hold the group, and freeing it there sometimes hangs (torch 2.13, gloo).
    gc.collect()
    PartialState().destroy_process_group()
    return code


def _train(options: RunOptions, config: AdaKDConfig) -> int:
    """The run itself; the exit code."""
    resume = _checkpoint(config)
    trainer, started = _trainer(options, config), _Started()
    trainer.add_callback(started)
    try:
        result = trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        print(
            "adakd train: interrupted; '--resume_from_checkpoint last' goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if resume is None or started.started:
            raise
        raise CommandError(f"checkpoint {resume}: cannot be resumed from: {_reason(error)}") from error
    metrics = dict(result.metrics)
    if options.eval_file:
        metrics.update(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)
    if trainer.is_world_process_zero():
        steps, focus_ratio = result.global_step, float(trainer.loss_fn.focus_ratio)
        print(json.dumps({"output_dir": config.output_dir, "steps": steps, "focus_ratio": focus_ratio, **metrics}))
    return 0


def parse(argv: list[str]) -> tuple[RunOptions, AdaKDConfig]:
    """Options from `--config FILE` and flags; a flag overrides the file.

    Raises:
        CommandError: an unknown option or a value that does not fit.
    """
    groups: Any = (RunOptions, AdaKDConfig)
    parser = _Parser(
        groups,
        prog="adakd train",
        allow_abbrev=False,
        usage="adakd train [--config run.yaml] [--OPTION VALUE ...]",
        description="Distil a teacher into a student. Options may stand in the YAML file; flags override it.",
    )
    parser.add_argument("--config", help="YAML file of options, named as the flags are, without the dashes.")
    given, _ = parser.parse_known_args(argv)
    from_file: list[str] = []
    if given.config is not None:
        from_file = _config_flags(Path(given.config))
        try:
            parser.parse_known_args(from_file)
        except CommandError as error:
            raise CommandError(f"{given.config}: {error}") from None
    try:
        options, config, _, unknown = parser.parse_args_into_dataclasses(
            from_file + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise CommandError(str(error)) from error
    if unknown:
        raise CommandError(f"unknown option {unknown[0]!r}; see adakd train --help")
    return options, config


def _config_flags(path: Path) -> list[str]:
    """The options of a YAML file as flags, so that the parser checks the file as it checks the command line."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise CommandError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{path}: expected options as 'name: value', got {type(content).__name__}")
    known = {f.name for cls in (RunOptions, AdaKDConfig) for f in fields(cls)}
    flags: list[str] = []
    for name, value in content.items():
        if name not in known:
            raise CommandError(f"{path}: unknown option {name!r}; see adakd train --help")
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _checkpoint(config: AdaKDConfig) -> str | None:
    """The checkpoint to resume from, or None to start a new run."""
    last = last_checkpoint(str(config.output_dir))
    wanted = config.resume_from_checkpoint
    if wanted is None:
        if last is not None:
            raise CommandError(
                f"output_dir {config.output_dir} holds checkpoints of an earlier run: give "
                "--resume_from_checkpoint last to continue it, or another --output_dir"
            )
        return None
    if wanted == "last":
        if last is None:
            raise CommandError(f"output_dir {config.output_dir} has no complete checkpoint to resume from")
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise CommandError(f"checkpoint {wanted}: no checkpoint of a trainer: trainer_state.json is missing")
    return str(wanted)


def _trainer(options: RunOptions, config: AdaKDConfig) -> AdaKDTrainer:
    """The trainer with everything loaded: tokenizers and records first, because loading the models takes longest."""
    hub: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    tokenizer = _load("student", options.student, lambda name: AutoTokenizer.from_pretrained(name, **hub))
    teacher_tokenizer = _load("teacher", options.teacher, lambda name: AutoTokenizer.from_pretrained(name, **hub))
    try:
        check_same_tokenizer(tokenizer, teacher_tokenizer)
        train = load_records(str(options.train_file), tokenizer, options.max_length)
        held_out = load_records(options.eval_file, tokenizer, options.max_length) if options.eval_file else None
    except ValueError as error:
        raise CommandError(str(error)) from error
    if config.should_log:
        _report(options.train_file, train, options.max_length)
        _report(options.eval_file, held_out, options.max_length)
    hub["attn_implementation"] = options.attn_implementation
    student = _load(
        "student",
        options.student,
        lambda name: AutoModelForCausalLM.from_pretrained(name, dtype=options.student_dtype, **hub),
    )
    teacher = _load(
        "teacher",
        options.teacher,
        lambda name: AutoModelForCausalLM.from_pretrained(name, dtype=options.teacher_dtype, **hub),
    )
    try:
        return AdaKDTrainer(
            model=student,
            teacher=teacher,
            args=config,
            train_dataset=train.records,
            eval_dataset=held_out.records if held_out else None,
            processing_class=tokenizer,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise CommandError(str(error)) from error


def _load(role: str, name: str | None, load: Callable[[Any], Any]) -> Any:
    """What `load` makes of a folder or hub name; every error becomes one that names it."""
    # "owner/name" may be on the hub. A name that looks like a path is a folder and nothing else.
    looks_like_path = str(name).startswith(("/", ".", "~")) or str(name).count("/") > 1
    if looks_like_path and not Path(str(name)).is_dir():
        raise CommandError(f"{role} {name}: no such folder")
    try:
        return load(name)
    except Exception as error:
        raise CommandError(f"{role} {name}: cannot be loaded: {_reason(error)}") from error


def _report(path: str | None, loaded: LoadedRecords | None, max_length: int) -> None:
    if loaded is None:
        return
    text = f"{path}: {len(loaded.records)} records"
    if loaded.truncated:
        text += f", {loaded.truncated} of them without the end of their answer (max_length={max_length})"
    if loaded.dropped:
        text += f"; {loaded.dropped} more left out, their prompts leave no room for an answer"
    print(text, file=sys.stderr)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
