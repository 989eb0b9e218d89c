"""Resumes runs that were stopped: chooses the checkpoint, compares the settings, and decides which checkpoints are kept.

A checkpoint is enough to resume bit by bit, since randomness and the order of images depend only on images and steps.
"""

import logging
import os
import re
import shutil
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoints.build import save_checkpoint
from checkpoints.read import average_names, averages_of, read_checkpoint
from checkpoints.sharded import check_pieces, load_sharded, read_settings, save_sharded
from images.folders import listed
from machine.flags import marked_may_change
from machine.precision import rounding
from machine.processes import explain, one_line
from machine.stops import STATUS, Stopped, end_readers, postpone

ABOUT_IMAGES = {"data", "class_names"}  # settings that changed_images compares
WITHOUT_FLAG = {"vae_digest": "the encoder of --vae"}
ENDINGS = (".pt", ".dcp")  # of a file, and with --parallel fsdp of a folder
logger = logging.getLogger("train")


def checkpoints(experiment):
    """Returns (step, path) of an experiment's checkpoints, the newest first."""
    found = [path for path in Path(experiment, "checkpoints").glob("*.*") if path.suffix in ENDINGS and path.stem.isdecimal()]
    return sorted(((int(path.stem), path) for path in found), reverse=True)


def checkpoint_to_resume(resume, results_dir, model):
    """Returns the path of the checkpoint that --resume names: a file, or the newest undamaged one of an experiment's folder;
    for "auto", that of the last experiment of that model in results_dir that has any, or None if there is none.

    ValueError or OSError if no run can resume from it, or all checkpoints are damaged.
    """
    if resume == "auto":
        name = re.compile(rf"\d{{3,5}}-{re.escape(model.replace('/', '-'))}", re.ASCII)  # a date has more digits
        root = Path(results_dir)
        experiments = [entry for entry in root.iterdir() if name.fullmatch(entry.name)] if root.is_dir() else []
        experiments = [entry for entry in experiments if checkpoints(entry)]
        if not experiments:
            return None
        resume = max(experiments, key=lambda entry: int(entry.name.partition("-")[0]))
    resume = Path(resume)
    if resume.suffix in ENDINGS:
        check_whole(resume)
        if resume.parent.name != "checkpoints" or not resume.stem.isdecimal():
            raise ValueError(f"--resume {resume}: a run goes on from a file <step>.pt in its folder's checkpoints")
        newer = [path.name for step, path in checkpoints(resume.parent.parent) if step > int(resume.stem)]
        if newer:
            raise ValueError(f"--resume {resume}: there are newer ones, {', '.join(newer)}; to go on from here, move them away")
        return resume
    if not checkpoints(resume):
        raise FileNotFoundError(f"--resume {resume}: no checkpoints/<step>.pt in it")
    for _, path in checkpoints(resume):
        try:
            check_whole(path)
            return path
        except ValueError as error:
            logger.warning(f"{error}; going on from the one before")
    raise ValueError(f"--resume {resume}: no checkpoint in it is whole")


def check_whole(path):
    """Reads a whole checkpoint. ValueError if a byte of it is missing or has changed."""
    if path.is_dir():
        return check_pieces(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if damaged:
        raise ValueError(f"{path} is damaged ({damaged})")


def find_run(resume, results_dir, model, processes):
    """Returns the run that --resume names: everything in its checkpoint but tensors (step, args, scaler and so on), its path
    and the experiment's folder. None if a new run should begin. ValueError if no run can resume from it."""
    looks = resume and processes.rank == 0
    path = processes.share(checkpoint_to_resume(resume, results_dir, model) if looks else None)
    if path is None:
        return None
    sharded = path.suffix == ".dcp"
    contents = read_settings(path) if sharded else read_checkpoint(path)
    needed = {"args", "step", "scaler"} if sharded else {"args", "step", "scaler", "model", "ema", "opt"}
    if missing := needed - contents.keys():
        raise ValueError(f"--resume {path}: no run can go on from it, it lacks {', '.join(sorted(missing))}")
    plain = {name: value for name, value in contents.items() if not name.startswith(("model", "ema", "opt"))}
    return plain | dict(path=path, folder=path.parent.parent)


def begun_with(settings):
    """Returns, from the settings of a run's last checkpoint or of a new run, those with which it began: when it goes on, the
    flags may omit --init-from and, with --allow-changes, give another seed."""
    return dict(init_from=settings.get("init_from"), first_seed=settings.get("first_seed", settings.get("global_seed")))


def record_rounding(run, settings, processes):
    """Returns the conditions on which the last bits of a run's weights depend, one dict per change of conditions, and a line
    that says what has changed since its last checkpoint, or None. run: from find_run. settings: the flags, a dict."""
    now = rounding(processes) | {name: settings[name] for name in ("grad_accum", "parallel", "compile", "backend")}
    before = run.get("rounding", []) if run else []
    names = [name for name in now if before and before[-1].get(name, now[name]) != now[name]]  # older checkpoints lack some
    if not names:
        return before or [now], None
    changes = ", ".join(f"{name} {before[-1][name]} is now {now[name]}" for name in names)
    return [*before, now], f"The last bits may differ from those of a run that was not stopped: {changes}"


def check_changes(run, now, parser, allowed):
    """Returns a phrase for every setting that affects the weights and has changed. ValueError with these phrases unless changes
    are allowed. now: the settings, a dict. parser: that of the flags; it marks those that affect only the length, speed and
    monitoring of a run, and has defaults for settings that an older checkpoint lacks."""
    before = {flag.dest: flag.default for flag in parser._actions} | run["args"]
    may_change = marked_may_change(parser)
    if now["lr_schedule"] == "cosine":
        may_change -= {"epochs", "max_steps"}  # which decide how fast the learning rate falls
    ignored = may_change | ABOUT_IMAGES | (set() if now["init_from"] else {"init_from"})  # a resumed run may omit --init-from
    if (then := (before.get("data") or {}).get("names")) and then == now["data"].get("names"):
        ignored |= {"data_path"}                                           # the same images, moved or called otherwise
    names = [name for name in now if name in before and name not in ignored and before[name] != now[name]]
    called = {name: WITHOUT_FLAG.get(name, f"--{name.replace('_', '-')}") for name in names}
    changes = [f"{called[name]} was {before[name]} and is {now[name]}" for name in names] + changed_images(before, now)
    if changes and any(name in before and before[name] != now[name] for name in ("global_batch_size", "global_seed", "data")):
        changes.append("so that images may come twice in the epoch that was begun, and others not at all")
    if changes and not allowed:
        way_out = "--allow-changes goes on all the same, if weights still fit"
        raise ValueError(f"{run['path']} is of other settings: {'; '.join(changes)}; {way_out}")
    return changes


def changed_images(before, now):
    """Returns a phrase for each change in the images at --data-path, as far as a checkpoint knows them: older ones do not."""
    changes, (was, is_) = [], (set(settings.get("class_names") or now["class_names"] or ()) for settings in (before, now))
    if was != is_:
        parts = [f"{kind}: {listed(sorted(names))}" for kind, names in (("gone", was - is_), ("new", is_ - was)) if names]
        changes.append(f"the classes have changed ({'; '.join(parts)})")
    then, images = before.get("data") or {}, now["data"]
    if then and then["images"] != images["images"]:
        changes.append(f"the images were {then['images']:,} and are {images['images']:,}")
    elif other := [name for name in ("names", "sizes") if name in then and then[name] != images.get(name)]:
        changes.append(f"the images have other {' and '.join(other)} than they had")
    return changes


def restore(learner, run):
    """Restores the learner from the checkpoint of find_run. ValueError if its tensors do not match the learner's."""
    stored = tensors(learner, stored_averages(learner.averages, run))
    if run["path"].suffix == ".dcp":
        load_sharded(run["path"], stored)
    else:
        # The file is mapped only until this function returns: if it stayed mapped, deleting it would not free its disk space.
        contents = read_checkpoint(run["path"])
        names = [name for name, _ in learner.model.named_parameters()]
        moments = {names[number]: state for number, state in contents["opt"]["state"].items() if number < len(names)}
        copy_into(stored, contents | dict(opt=moments), run["path"])
    if run["scaler"]:  # empty if the run was not in float16
        learner.scaler.load_state_dict(run["scaler"])
    if spoilt := first_not_finite(learner):
        raise ValueError(f"{run['path']}: {spoilt} is not finite; to go on from the one before, move it away")
    learner.step = run["step"]


def stored_averages(decays, run):
    """Returns the name in a run's checkpoint from which each of the averages, by decay, resumes: its own, or, if the first has
    a decay that the checkpoint lacks, that of the checkpoint's first. ValueError if an average has none."""
    known = averages_of(run["args"])
    names = {decay: known.get(decay, name) for decay, name in average_names(decays).items()}
    if known and ({*names.values()} - {*known.values()} or len({*names.values()}) < len(names)):
        kept, wanted = (", ".join(map(str, some)) for some in (known, decays))
        raise ValueError(f"{run['path']} has averages of decay {kept}, and none to go on from for each of {wanted}")
    return names


def copy_into(values, stored, path):
    """Copies stored tensors into those of the same name, in dicts of dicts. ValueError if a name or shape differs."""
    for name, value in values.items():
        if name not in stored:
            raise ValueError(f"{path} does not fit: {name} is missing")
        if isinstance(value, dict):
            copy_into(value, stored[name], path)
        elif value.shape != stored[name].shape:
            raise ValueError(f"{path} does not fit: {name} is {tuple(stored[name].shape)}, not {tuple(value.shape)}")
        elif isinstance(value, DTensor):
            value.copy_(distribute_tensor(stored[name], value.device_mesh, value.placements))
        else:
            value.copy_(stored[name])


def save_run(experiment, learner, settings, processes, rounding, alone=False):
    """Writes a checkpoint with a dict of settings, and returns its path.

    Every process calls it; with `alone`, one process that cannot wait for the others, which then returns None if it has nothing
    to write. ValueError for weights, averages or moments that are not finite, which would replace good ones; OSError if the
    checkpoint cannot be written, or only elsewhere, or not by one process alone.
    """
    contents = dict(args=settings, step=learner.step, scaler=learner.scaler.state_dict(), rounding=rounding)
    sharded, first = isinstance(learner.model, FSDPModule), processes.rank == 0
    path = Path(experiment, "checkpoints", f"{learner.step:07d}.{'dcp' if sharded else 'pt'}")
    if alone and sharded:
        raise OSError(f"cannot write the checkpoint {path}: every process has a part of it, and they have lost each other")
    if alone and not first and (not path.parent.is_dir() or any(path.parent.glob(f"{path.name}*"))):
        return None
    spoilt = first_not_finite(learner)
    if processes.any(spoilt is not None)[0] if sharded else spoilt:        # processes that share no weights all have the same
        what = spoilt or "a part on another process"
        raise ValueError(
            f"after step {learner.step} {what} is not finite, so that nothing of it is saved; the checkpoints before stay, and "
            "a lower --lr, --max-grad-norm or --precision fp32 may help"
        )
    try:
        if sharded:
            save_sharded(path, tensors(learner), **contents)
        elif first or alone:
            save_somewhere(path, **tensors(learner) | dict(opt=learner.opt.state_dict()), **contents)
    except Stopped:
        logger.warning(f"{path} is not written, because Ctrl-C came twice")
        raise
    return path


def save_somewhere(path, **contents):
    """Writes a checkpoint to `path`, or else to a folder of the same form among the system's temporary files, from which a run
    can go on too: then, or if that is not possible either, an OSError says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        return save_checkpoint(path, **contents)
    except OSError as error:
        problem = error
    try:
        second = Path(tempfile.mkdtemp(prefix=f"{path.parent.parent.name}-"), "checkpoints", path.name)
        second.parent.mkdir()
        save_checkpoint(second, **contents)
    except OSError as error:
        raise OSError(f"{problem}; and {error}") from problem
    raise OSError(f"{problem}; it is in {second}: --resume {second} goes on from there") from problem


@contextmanager
def rescue(learner, save):
    """Saves the learner when anything ends the training in its body: a signal, a fault, or an error in the code.

    save(alone=True) saves `learner`. Nothing is saved in the middle of an update, when some weights belong to one step and
    some to the next.
    """
    with ExitStack() as spare:
        for _ in range(4):  # reserves file descriptors, so that a checkpoint can be written when no more can be opened
            spare.enter_context(open(os.devnull))
        try:
            yield
        except BaseException as error:
            postpone()
            spare.close()
            end_readers()
            how = f" by {error}" if isinstance(error, Stopped) else f": {explain(error) or one_line(error)}"
            if learner.step is None:
                logger.warning(f"Stopped in the middle of an update{how}; nothing is saved that came after the last checkpoint")
            else:
                logger.info(f"Stopped after step {learner.step:,}{how}")
                try:
                    save(alone=True)
                except Exception as problem:
                    if isinstance(error, Stopped):
                        raise  # so that the exit status shows that nothing was saved
                    logger.warning(one_line(problem))
            if isinstance(error, Stopped):  # the log already says so
                raise SystemExit(STATUS) from None
            raise


def delete_older(experiment, newest, last, every):
    """Deletes all checkpoints but the newest `last` and those of every `every`-th step; with last None, none.

    Those after step `newest` are damaged, or the run would have gone on from them: they do not count and stay.
    """
    older = [(step, path) for step, path in checkpoints(experiment) if step <= newest][last:] if last else []
    for step, path in older:
        if not every or step % every:
            delete(path)


def delete_half_written(experiment):
    """Deletes the files that a kill left half written in an experiment's folder."""
    for partial in (*Path(experiment).glob("*.partial"), *Path(experiment, "checkpoints").glob("*.partial")):
        delete(partial)


def delete(path):
    return shutil.rmtree(path) if path.is_dir() else path.unlink()


def tensors(learner, names=None):
    """Returns all tensors that updates change, by name, as they lie in memory: writing into them changes the learner. names: of
    the averages in a checkpoint, by decay, if they are not the usual ones."""
    names = names or average_names(learner.averages)
    averages = {name: learner.averages[decay].state_dict() for decay, name in names.items()}
    moments = {name: learner.opt.state[p] for name, p in learner.model.named_parameters() if p in learner.opt.state}
    return dict(model=learner.model.state_dict(), **averages, opt=moments)


def first_not_finite(learner):
    """Names a tensor with NaN or infinity in it, of those that updates change and as far as this process has them; or None."""
    values = tensors(learner)
    moments = {f"{name}, {moment}": x for name, state in values.pop("opt").items() for moment, x in state.items()}
    for part, named in (values | dict(opt=moments)).items():
        mine = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in named.items()}
        # Tests the extremes, which are NaN if any number is: testing every number takes 15 times as long on CPUs.
        extremes = {name: torch.stack(x.aminmax()).float() for name, x in mine.items() if x.numel()}
        finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist()
        if not all(finite):
            return f"{list(extremes)[finite.index(False)]} of {part}"
    return None
