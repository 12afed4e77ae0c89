"""The demo from start to end: teacher, answers, student, two runs, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..commands.models import lines_to_try
from .answers import Answer, Record, answer_fingerprint, answer_records, load_instructions
from .config import DemoConfig, DemoError
from .evaluate import answer_states, distance, rouge_l
from .models import cut_layers, load_model, locate_teacher, parameter_count, prepare_teacher, save_model
from .progress import stage
from .report import Run, Score, examples, machine, table, verdict, write_figure, write_json
from .training import ADAKD, PLAIN, train_run

BEFORE, PLAIN_NAME, ADAKD_NAME = "before", "plain", "AdaKD"

KINDS_OF_ROWS = """\
There are two kinds of rows. KL and cross-entropy read the teacher's answers: at each token of them, what the student
would say next is compared with what the teacher would. This is what plain reverse KL trains. ROUGE-L reads what the
student says by itself: sampled at temperature 1, as the paper measures, and greedy. A sharper student slips less often
when it samples, so it can be ahead in ROUGE-L and behind in KL; docs/quality.md tells the two effects apart.
One run each, with one order of the data: another order can turn a small difference around."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where it wrote it.

    Attributes:
        scores: of the student "before" training, and after the "plain" and the "AdaKD" run.
        runs: the two runs.
        seconds: wall-clock time of each stage.
        files: report (Markdown), figure (PNG) and numbers (JSON).
        students: folders of the students of the two runs, each with its tokenizer.
    """

    scores: dict[str, Score]
    runs: tuple[Run, Run]
    seconds: dict[str, float]
    files: tuple[Path, Path, Path]
    students: tuple[Path, Path]


def run_demo(config: DemoConfig) -> DemoResult:
    """Run the demo: print progress and a report, and write the report, a figure, all numbers and both students to
    `config.output_dir`.

    The converted teacher and its answers stay in `config.cache_dir`; a second start with the same settings reads them.

    Raises:
        DemoError: something is missing; the message says what to do.
    """
    device, dtype = config.torch_device(), config.torch_dtype()
    seconds: dict[str, float] = {}
    files = locate_teacher(config)
    train, held_out = load_instructions(config)
    print(f"{machine(device)}, {str(dtype).removeprefix('torch.')}", flush=True)

    with stage("teacher", "1/5 teacher", seconds):
        teacher, tokenizer = load_model(prepare_teacher(config, files), dtype=dtype, device=device)
    student = _cut(config, teacher)
    print(
        f"student: {len(student.get_decoder().layers)} of {len(teacher.get_decoder().layers)} layers, "
        f"{parameter_count(student) / 1e6:.1f} of {parameter_count(teacher) / 1e6:.1f} million parameters",
        flush=True,
    )
    with stage("answers", f"2/5 the teacher answers {len(train)} + {len(held_out)} instructions", seconds):
        answers = _teacher_answers(config, files.fingerprint(), teacher, tokenizer, [*train, *held_out])
    learnt, references = answers[: len(train)], answers[len(train) :]
    measure = _Measure(config, teacher, tokenizer, held_out, references)
    scores, runs, said = {}, [], {"teacher": references}
    with stage("before", "3/5 the student before training", seconds):
        scores[BEFORE], said[BEFORE] = measure(student, BEFORE)
    methods = ((PLAIN_NAME, PLAIN, "plain reverse KL"), (ADAKD_NAME, ADAKD, "AdaKD on reverse KL"))
    for number, (name, options, title) in enumerate(methods, start=4):
        with stage(name, f"{number}/5 {title}, {config.steps} steps of {config.batch_size} records", seconds):
            # The optimizer adds steps that bfloat16 would round away, so the weights that it updates are float32.
            student = _cut(config, teacher).float()
            runs.append(train_run(name, options, student, teacher, tokenizer, learnt, config, probe=measure.probe))
            scores[name], said[name] = measure(student.to(dtype), name)
            save_model(student, tokenizer, config.output_dir / name.lower())
    return _report(config, scores, (runs[0], runs[1]), seconds, held_out, said, tokenizer)


def _cut(config: DemoConfig, teacher: Any) -> Any:
    try:
        return cut_layers(teacher, config.first_cut, config.layers_cut).requires_grad_(True)
    except ValueError as error:
        raise DemoError(f"{error}; set first_cut and layers_cut") from None


def _teacher_answers(
    config: DemoConfig, teacher_id: str, teacher: Any, tokenizer: Any, records: Sequence[Record]
) -> list[Answer]:
    # What the batches round together decides near ties, so batch size and type are among the settings.
    settings = {
        "max_new_tokens": config.max_new_tokens,
        "repetition_penalty": config.repetition_penalty,
        "batch": config.answer_batch,
        "dtype": str(config.torch_dtype()),
    }
    cache = config.cache_dir / f"ids-{answer_fingerprint(teacher_id, records, settings)}.jsonl"
    return _answer(config, teacher, tokenizer, records, "teacher", cache)


def _answer(
    config: DemoConfig, model: Any, tokenizer: Any, records: Sequence[Record], label: str, cache: Path | None = None
) -> list[Answer]:
    """The greedy answers."""
    return answer_records(
        model,
        tokenizer,
        records,
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty,
        batch_size=config.answer_batch,
        cache=cache,
        label=label,
    )


class _Measure:
    """Scores of a student on the held-out records; what the teacher contributes is computed once."""

    def __init__(
        self, config: DemoConfig, teacher: Any, tokenizer: Any, records: Sequence[Record], references: Sequence[Answer]
    ) -> None:
        self.config, self.teacher, self.tokenizer = config, teacher, tokenizer
        self.records, self.references = records, references
        # Every n-th record, so that the probe has all categories.
        self.probed = references[:: max(1, len(references) // max(1, config.probe_records))][: config.probe_records]
        self.states = answer_states(teacher, references, batch_size=config.batch_size)[0]
        self.probed_states = answer_states(teacher, self.probed, batch_size=config.batch_size)[0]

    def __call__(self, student: Any, label: str) -> tuple[Score, list[Answer]]:
        student.eval()
        far = distance(
            student, self.teacher, self.references, batch_size=self.config.batch_size, teacher_states=self.states
        )
        said = _answer(self.config, student, self.tokenizer, self.records, label)
        sampled = [
            answer_records(
                student,
                self.tokenizer,
                self.records,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.answer_batch,
                sampling_seed=self.config.seed + draw,
                label=f"{label}, sampled {draw + 1} of {self.config.draws}",
            )
            for draw in range(self.config.draws)
        ]
        return Score(far, rouge_l(said, self.references), [rouge_l(each, self.references) for each in sampled]), said

    def probe(self, student: Any) -> float:
        dtype = self.config.torch_dtype()
        with torch.autocast(self.config.torch_device().type, dtype, enabled=dtype != torch.float32):
            far = distance(
                student, self.teacher, self.probed, batch_size=self.config.batch_size, teacher_states=self.probed_states
            )
        return far.reverse_kl


def kinds_of_rows(draws: int) -> str:
    """What the rows of the table are."""
    spread = f"\n± is the standard deviation over {draws} answers to each instruction."
    return KINDS_OF_ROWS + (spread if draws > 1 else "")


def _report(
    config: DemoConfig,
    scores: dict[str, Score],
    runs: tuple[Run, Run],
    seconds: dict[str, float],
    held_out: Sequence[Record],
    said: dict[str, list[Answer]],
    tokenizer: Any,
) -> DemoResult:
    files = (config.output_dir / "report.md", config.output_dir / "demo.png", config.output_dir / "demo.json")
    students = config.output_dir / PLAIN_NAME.lower(), config.output_dir / ADAKD_NAME.lower()
    lines = lines_to_try(str(students[1]), tokenizer)
    shown = examples(held_out, said, count=config.examples)
    total = sum(seconds.values())
    text = (
        f"{len(held_out)} held-out instructions, {scores[BEFORE].distance.tokens} answer tokens of the teacher, "
        f"{config.steps} steps of {config.batch_size} records, {machine(config.torch_device())}:\n\n"
        f"{table(scores)}\n\n{verdict(scores, PLAIN_NAME, ADAKD_NAME)}\n\n"
        f"{kinds_of_rows(config.draws)}\n"
    )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    files[0].write_text(
        f"# Demo\n\n{text}\n## Answers\n\n```\n{shown}\n```\n\n![runs](demo.png)\n\n"
        f"## To try AdaKD's student\n\n```python\n{lines}```\n",
        encoding="utf-8",
    )
    write_figure(files[1], runs)
    write_json(files[2], config, scores, runs, seconds)
    print(f"\n{shown}\n\n{text}\n{total:.0f} s in all. " + "Wrote " + ", ".join(map(str, files)))
    print(f"The students are in {students[0]} and {students[1]}. To try the second:\n\n{lines}", flush=True)
    return DemoResult(scores, runs, seconds, files, students)
