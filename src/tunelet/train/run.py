"""One training from recipe to saved model: check the data, load the model, train, save, mark the run DONE or FAILED.

Not the loop (train/loop.py) and not the before and after of `tunelet align` (align.py), made of the same parts.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError
from tunelet.recipe import PREFERENCE, VIRTUAL, Recipe
from tunelet.recipe_text import resolved
from tunelet.runs import history, lock, report
from tunelet.runs.record import RESOLVED, STAGES, Run, check_folder, is_run, must_be_free
from tunelet.train import defaults, energy, follow, guard
from tunelet.train.progress import Interrupted

if TYPE_CHECKING:
    from tunelet.data.examples import Tokens
    from tunelet.models.device import Choice
    from tunelet.train.loop import Trained
    from tunelet.train.prepare import Prepared

TOKENIZER = "tokenizer"  # folder of the run that holds a tokenizer trained for it
WORK = ("log.jsonl", "checkpoints", "eval", "model", "adapter")  # a run that has one of these has done something
MASKS = 4  # rows in masks.html


def run_training(recipe: Recipe, out: Path, *, origins: Mapping[str, str] | None = None, console: Any) -> Run:
    """Train as `recipe` says, into the run folder `out`.

    The same call on an unfinished run goes on with it. Raises TuneletError on a user's mistake (a finished run, another
    recipe's run, bad data, ...), Interrupted after Ctrl-C. A mistake found before training starts leaves no folder
    behind.
    """
    recipe, origins = resolve(recipe, origins or {})
    follow.tell_recipe(recipe)
    with opened(recipe, out, origins, contextlib.nullcontext()) as (run, prepared):
        choice = choose(recipe, run, console)
        recipe = settle(recipe, run, prepared, choice, console)
        trained = train_and_save(recipe, run, prepared, None, choice, console)
        if recipe.model.quantization != "none" and choice.processes == 1:
            over_whole_base(run, recipe, prepared.eval_rows, trained.held_out_loss, choice, console)
        run.done(**figures(trained))
        report.write(run)
    console.print(f"Saved {run.model_folder()}.", markup=False, highlight=False)
    return run


def resolve(recipe: Recipe, origins: Mapping[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The recipe with every value that depends on the model filled in, and the origin of each."""
    recipe, origins = recipe.model_copy(deep=True), dict(origins)
    if not recipe.train.learning_rate:
        rate, why = defaults.learning_rate(
            recipe.method.name, recipe.adapter.kind, _parameters(recipe), recipe.model.path == ""
        )
        recipe.train.learning_rate = rate
        origins["train.learning_rate"] = why
    method = recipe.method
    if not method.beta and (beta := defaults.beta(method.name, method.loss_type)):
        method.beta = beta
        origins["method.beta"] = f"default for {method.name}"
    if method.name == "simpo" and not method.simpo_gamma:
        method.simpo_gamma = method.beta / 2  # as in the paper's best runs
        origins["method.simpo_gamma"] = "default for simpo: half of beta"
    return recipe, origins


def _parameters(recipe: Recipe) -> int:
    from tunelet.models import load, weights

    if recipe.model.path:
        return weights.count_parameters(load.resolve(recipe.model.path))
    model = load.new_model(recipe.model.architecture, recipe.tokenizer.vocab_size, {}, seed=0)
    return sum(p.numel() for p in model.parameters())


def _prepared(recipe: Recipe, folder: Path) -> Prepared:
    """The rows; before they are read, whether an adapter that is trained on is the recipe's."""
    from tunelet.models import adapters, load
    from tunelet.train.prepare import prepare

    if recipe.model.path and (config := load.peft_config(load.resolve(recipe.model.path, weights_too=False))):
        adapters.check_same(config, recipe.adapter, recipe.model.path)
    return prepare(recipe, folder)


@contextlib.contextmanager
def opened(
    recipe: Recipe, out: Path, origins: Mapping[str, str], checking: contextlib.AbstractContextManager[Any]
) -> Iterator[tuple[Run, Prepared]]:
    """The run in `out`, new or to go on with, and its data, checked (inside `checking`); no other process works in it.

    A new run's folder is made only once its data is found to be good, and goes away again where a user's mistake ends
    the block before anything was trained or measured. Any other error is written to FAILED.json.
    """
    out = Path(out)
    check_folder(out, recipe)
    with contextlib.ExitStack() as stack:
        with checking:
            if is_run(out):
                stack.enter_context(lock.held(out))
                run, _ = Run.open_or_create(out, recipe, origins)
                if run.status == "finished":
                    raise TuneletError(
                        f"{out}: this run is finished.",
                        why="a run is never written over",
                        fix=f"Look at it with: tunelet report {out}; or choose another --out.",
                    )
                prepared = _prepared(recipe, run.folder / TOKENIZER)
                run.going_on()
            else:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunelet-")))
                prepared = _prepared(recipe, scratch / TOKENIZER)
                stack.enter_context(lock.held(out))
                must_be_free(out)  # still: another process may have come and gone
                stack.enter_context(_gone_if_nothing_done(out))
                run = Run.create(out, recipe, origins)
                if (scratch / TOKENIZER).is_dir():
                    with run.folder_in_the_making(TOKENIZER) as folder:
                        shutil.copytree(scratch / TOKENIZER, folder, dirs_exist_ok=True)
            run.write_json("data.json", prepared.data_json)
            _write_masks(run, prepared)
        with record_failure(run):
            yield run, prepared


@contextlib.contextmanager
def _gone_if_nothing_done(folder: Path) -> Iterator[None]:
    try:
        yield
    except TuneletError as error:
        if error.exit_code == 2 and not any((folder / name).exists() for name in WORK):
            for path in folder.iterdir():
                if path.name != STAGES:  # what was trained before this one stays
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
                if folder.parent.name == STAGES:
                    folder.parent.rmdir()
                    folder.parent.parent.rmdir()
        raise


def _write_masks(run: Run, prepared: Prepared) -> None:
    """masks.html: some rows with their trained tokens marked."""
    from tunelet.data import show

    if prepared.train_rows and not (run.folder / "masks.html").exists():
        rows = sorted(prepared.train_rows[:200], key=lambda row: len(row.ids))
        some = rows[:: max(1, len(rows) // MASKS)][:MASKS]  # short and long ones
        run.write_text("masks.html", show.page(some, prepared.tokenizer))


def choose(recipe: Recipe, run: Run, console: Any) -> Choice:
    """Device, dtype and threads of this run: a run that goes on keeps those it began with, because other ones would
    round differently."""
    from tunelet.models import device

    choice = device.choose(recipe.model.device, recipe.model.dtype, recipe.model.threads)
    began = (run.read_json("env.json") or {}).get("choice")
    if began and (began["device"], began.get("processes", 1)) == (choice.device, choice.processes):
        choice = device.Choice(**began)
    device.apply(choice)
    run.write_env(choice)
    each = f" in each process ({choice.reasons['threads']})" if choice.processes > 1 else ""
    console.print(
        f"{choice.device}, {choice.dtype} ({choice.reasons['dtype']}), {choice.threads} threads{each}",
        markup=False,
        highlight=False,
    )
    return choice


def looked_at(recipe: Recipe) -> tuple[Prepared, Choice]:
    """Data and device of a training that is only planned: nothing is written."""
    from tunelet.models import device

    with tempfile.TemporaryDirectory(prefix="tunelet-") as scratch:
        prepared = _prepared(recipe, Path(scratch))
    choice = device.choose(recipe.model.device, recipe.model.dtype, recipe.model.threads)
    device.apply(choice)
    return prepared, choice


def settle(recipe: Recipe, run: Run, prepared: Prepared, choice: Choice, console: Any) -> Recipe:
    """The recipe with nothing left open, and plan.json's prediction. A run that goes on keeps what it began with, even
    if other programs have taken the memory since. Raises TuneletError where the machine is too small."""
    from tunelet.train import fit

    began = run.recipe()
    if run.read_json("plan.json", {}).get("predicted") is not None:
        return fit.settled_as(recipe, began)
    parameters = _parameters(recipe) if recipe.method.name in PREFERENCE else 0
    remarks = guard.before(recipe, parameters)
    run.write_json("guard.json", [asdict(remark) for remark in remarks])
    for remark in remarks:
        console.print(str(remark), markup=False, highlight=False, soft_wrap=True)
    console.print("Predicting ...", markup=False, highlight=False)
    made = fit.make(recipe, choice, prepared.tokenizer, prepared.train_rows, prepared.eval_rows, run.folder)
    if made.impossible:
        raise fit.too_large(made)
    run.write_text(RESOLVED, resolved(made.recipe, {**run.origins(), **made.origins}))
    run.plan(made.prediction.figures())
    for line in fit.lines(made):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return made.recipe


def load_for_training(recipe: Recipe, prepared: Prepared, choice: Choice) -> Any:
    """The model of the recipe, ready to train: random weights, a checkpoint, a checkpoint with a new adapter, or an
    adapter to train on."""
    from tunelet.models.ready import make_ready

    model = _model(recipe, prepared.tokenizer, choice)
    settings = recipe.train
    return make_ready(model, checkpointing=settings.gradient_checkpointing == "on", compiled=settings.compile)


def _model(recipe: Recipe, tokenizer: Any, choice: Choice) -> Any:
    from tunelet.models import adapters, load

    if recipe.model.quantization != "none" and recipe.adapter.kind == "none":
        raise TuneletError(
            f"model.quantization = {recipe.model.quantization} needs an adapter.",
            why="quantised weights are frozen: there would be nothing to train",
            fix="Add --adapter lora, or --set model.quantization=none.",
        )
    if not recipe.model.path:
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        return load.new_model(recipe.model.architecture, len(tokenizer), ids, recipe.train.seed, choice)
    model = load.load_model(
        recipe.model.path,
        choice,
        trust_remote_code=recipe.model.trust_remote_code,
        trainable=True,
        quantization=recipe.model.quantization,
    )
    load.check_tokenizer(model, tokenizer, recipe.model.path)
    if not hasattr(model, "peft_config") and recipe.adapter.kind != "none":
        model = adapters.add(model, recipe.adapter, recipe.train.seed, tokenizer)
    return model


def train_and_save(recipe: Recipe, run: Run, prepared: Prepared, model: Any, choice: Choice, console: Any) -> Trained:
    """Train (or go on), write model/ or adapter/, energy.json and plan.json's actual figures.

    model: from `load_for_training`; None: it is loaded.
    """
    from tunelet.models import adapters, device, save
    from tunelet.train import loop

    follow.tell_settled(recipe, choice, prepared, run.folder / TOKENIZER)
    if model is None:
        with energy.metered(run, "loading", choice.device):
            model = load_for_training(recipe, prepared, choice)
    if recipe.adapter.kind != "none":
        told = adapters.described(model, recipe.adapter)
        run.write_json("adapter.json", told)
        console.print(adapters.line(told), markup=False, highlight=False)
        said = run.read_json("guard.json", [])
        for remark in _end_token(recipe, model, prepared):
            console.print(str(remark), markup=False, highlight=False, soft_wrap=True)
            if asdict(remark) not in said:  # a run that goes on has it already
                run.write_json("guard.json", [*said, asdict(remark)])
    dtype = save.dtype_of(model, recipe.model.path, choice.dtype)
    device.start_peak(choice.device)
    with energy.metered(run, "training", choice.device):
        trained = loop.train(
            recipe,
            run,
            model=model,
            tokenizer=prepared.tokenizer,
            train_rows=prepared.train_rows,
            eval_rows=prepared.eval_rows,
            choice=choice,
            console=console,
        )
        peak = device.peak_since_mb(choice.device) if choice.processes == 1 else trained.peak_mb
        with run.folder_in_the_making("adapter" if hasattr(model, "peft_config") else "model") as folder:
            stops = prepared.renderer.stop_ids if recipe.method.name != "pretrain" else ()
            save.save(model, prepared.tokenizer, folder, dtype, stop_ids=stops)
    energy.fill_in(run, "training", trained.seconds)
    spent = run.read_json("energy.json")["parts"]["training"]["energy_wh"]
    run.actual({"seconds": trained.seconds, "peak_mb": peak, "disk_mb": run.disk_mb(), "energy_wh": spent})
    history.note(run)
    return trained


def over_whole_base(
    run: Run, recipe: Recipe, rows: Sequence[Tokens], loss: float | None, choice: Choice, console: Any
) -> None:
    """What an adapter that was trained over quantised weights is worth on the weights as they are, where it will be
    used: quantised.json has the held-out loss over both. loss: over the quantised ones."""
    from tunelet.evals.held_out import held_out_loss
    from tunelet.models import load

    if recipe.method.name not in ("sft", "pretrain") or not rows or loss is None:
        return
    model = load.load_model(run.folder, choice, trust_remote_code=recipe.model.trust_remote_code)
    found = held_out_loss(model, rows)
    if found is None:
        return
    kind = recipe.model.quantization
    run.write_json("quantised.json", {"quantization": kind, "held_out_loss": loss, "unquantised": found})
    console.print(
        f"Held-out loss {loss:.4f} over the {kind} weights it was trained on, {found['value']:.4f} over the base as it "
        "is.",
        markup=False,
        highlight=False,
    )


def _end_token(recipe: Recipe, model: Any, prepared: Prepared) -> list[guard.Remark]:
    """A warning where virtual tokens are to learn an end of answers that the frozen model cannot say."""
    from tunelet.models import adapters

    if recipe.adapter.kind not in VIRTUAL or recipe.method.name == "pretrain":
        return []
    unknown = adapters.untrained(model, prepared.tokenizer, prepared.renderer.stop_ids)
    return [
        guard.Remark(
            "end_token",
            "warn",
            f"answers end with {token}, which nothing has trained in this model (its output embedding is that of "
            f"{other}): a frozen model cannot learn to say it, and answers will run on.",
            "--set model.chat_template=plain (ends answers with the end of text), or an adapter in the layers",
        )
        for token, other in unknown
    ]


def figures(trained: Trained) -> dict[str, Any]:
    """What DONE says of the training."""
    return {
        "steps": trained.steps,
        "held_out_loss": trained.held_out_loss,
        "best_loss": trained.best_loss,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "peak_mb": trained.peak_mb,
        **({"stopped": trained.stopped} if trained.stopped else {}),
    }


class record_failure:
    """`with record_failure(run):` an error inside is written to FAILED.json. A stop that can be resumed is no
    failure."""

    def __init__(self, run: Run):
        self.run = run

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit)):
            return
        try:
            self.run.failed(error)
        except TuneletError:  # the disk that failed the training fails this too; the first error is the one to show
            return
