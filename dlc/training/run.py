"""A run of training, apart from what is trained: processes, results folder, EMA, optimizer, counters, log, checkpoints.

A trainer calls `Run` and is never called by it; its loop stays its own, and reads as if there were one process:

    with Run(parser, args) as run:
        run.claim(name, build, process, settings, notes)    # the results folder; refuses another run
        run.start()                                 # log, accelerator, seed
        model = run.adopt(build())                  # EMA, compiling, sharding
        run.optimize(optimizers, warmup)            # resumes
        for step, batch in run.steps(batches, measured):     # what is measured as training goes, see `Measurement`
            for part in run.micro_batches(batch):   # a dict of tensors (n, ...)
                terms = ...                         # dict of (n,), from run.model
                run.backward(terms, t, num_timesteps)
            run.update(step)                        # clips, steps, counts skipped steps, updates the EMA
            run.report(step)                        # measures, logs, checks that numbers are finite, writes checkpoints

The flags that it reads are those of `add_run_flags`.
"""

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from diffusion.process_table import Process
from dlc.machine.cli import ArgumentParser, needs, warn_once
from dlc.machine.files import DirectoryLock, check_apart, folder_names, names_in, write_json
from dlc.machine.folder import refuse_other_kind
from dlc.machine.processes import (
    agree,
    asked_precision,
    asked_to_compile,
    compile_blocks,
    create_accelerator,
    create_logger,
    done_by_rank_0,
    set_numerics,
    start_processes,
    versions,
    wait_for_all,
)
from dlc.training.batches import Batch, load_batches
from dlc.training.log import Losses, announce, write_line
from dlc.training.metrics_file import append_metrics, draw_losses, read_metrics, trim_metrics
from dlc.training.power_averages import PowerAverages, trim_snapshots, write_snapshot
from dlc.training.run_flags import OPTIMISATION, checkpoint_steps, ema_decay, steps_of_run
from dlc.training.sharding import fully_shard_blocks, local_shards
from dlc.training.stop import Stopped, StopRequest
from dlc.training.update import SkippedSteps, clip_gradients, update_ema
from dlc.weights.checkpoint import (
    begin_groups,
    gather_full,
    load_checkpoint,
    remove_old_checkpoints,
    remove_unfinished,
    save_checkpoint,
    unrecordable,
)
from dlc.weights.load import load_pretrained
from dlc.weights.meta import RunMeta, config_of, plain, resume_point, run_checkpoints, without_memory

if TYPE_CHECKING:
    from dlc.training.heldout import Measurement

# what a run writes into its folder, args.json first
WRITTEN = "args.json", "log.txt", "metrics.jsonl", "loss.png", "checkpoints", "best", "ema", "previews"
INODES = 20  # more than a checkpoint, a preview and the logs take


class Run(contextlib.ExitStack):
    """See above. As a context it reports what ends the run in one line, and releases the lock of the results folder.

    Attributes:
        state: from `start_processes`: num_processes, process_index, is_main_process.
        device: where this process trains.
        model: what a trainer calls: the module, wrapped for autocast, and for DDP or sharded.
        first_step: steps done before; 0 for a new run.
    """

    measured: Iterable["Measurement"] = ()  # as of `steps`

    def __init__(self, parser: ArgumentParser, args: argparse.Namespace):
        """Read the launcher's settings and join the processes. Contradictory flags end the program with one line."""
        super().__init__()
        self.parser, self.args, self.folder = parser, args, Path(args.results_dir)
        self.lock = DirectoryLock(self.folder)
        self.deadline = math.inf if args.stop_after is None else time.monotonic() + 3600 * args.stop_after
        self.callback(self.lock.release)
        less_memory = "--global-batch-size, or raise --grad-accum"
        self.enter_context(parser.one_line_errors("what is done is kept", less_memory, (OSError,)))
        with parser.one_line_errors():
            self.precision = asked_precision(args.precision)
            self.state = start_processes(args.grad_accum, [self.precision])
            self.device = self.state.device
            self.compiled = asked_to_compile(args.compile, self.device.type == "cuda")

    # ---------------------------------------------------------------------- setting up

    def claim(self, name: str, build: Callable, process: Process, settings: dict, notes: dict) -> None:
        """Lock the results folder, before anything reads it, and find the checkpoint to resume from.

        Args:
            name: the model's.
            build: makes the model. Here it is made without memory, to see what a checkpoint will record of it.
            process: what the model is trained on, from `create_process`.
            settings: what it is trained on, by any keys; with --allow-change a run may resume with others.
            notes: what is recorded and never compared, by any keys.

        Raises ValueError if the folder is in use, or holds another run or a damaged one; if processes disagree; and if
        the model or a setting cannot be recorded.
        """
        args, processes = self.args, self.state.num_processes
        needs(args, "ema_lengths", "ema_snapshot_every")
        settings = dict(settings, global_batch_size=args.global_batch_size, global_seed=args.global_seed)
        optimisation = {name: getattr(args, name) for name in OPTIMISATION}
        self.config = config_of(name, without_memory(build), process)
        self.recorded = settings, dict(notes, **optimisation, precision=self.precision, versions=versions())
        RunMeta.of_run(*self.recorded)  # raises for what a checkpoint could not hold
        done_by_rank_0(self.state, self._take_folder)
        self.resumed, meta, changed = resume_point(self.folder, self.config, settings, args.allow_change)
        known = {name: value for name, value in optimisation.items() if name in meta.noted}
        self.changed = "; ".join(filter(None, [changed, meta.differences(known)]))
        agree("checkpoints and features", (self.resumed and self.resumed.name, self.config, settings))
        if args.global_batch_size % (processes * args.grad_accum):
            raise ValueError(
                f"--global-batch-size {args.global_batch_size} is not a multiple of {processes} processes "
                f"x {args.grad_accum} micro-batches (--grad-accum)"
            )
        # the arguments of `TrainingBatches` that give this process its share of the steps that are left
        self.share = dict(seed=args.global_seed, global_batch=args.global_batch_size, rank=self.state.process_index)
        self.share.update(world_size=processes, first_step=meta.step, first_index=meta.place)
        self.first_step = meta.step
        self.logged, self.skipped = meta.logged, meta.skipped  # the last line's step; steps skipped since
        self.ema_start, self.ema_images = meta.ema_start or 0.0, meta.ema_images or 0
        self.micro_batch_size = args.global_batch_size // processes // args.grad_accum

    def _take_folder(self):
        sources = ("features_path", "data_path", "heldout_path", "condition_path")
        check_apart(self.folder, "--results-dir", [vars(self.args).get(name) for name in sources])
        refuse_other_kind(self.folder, WRITTEN[0])
        # a shell that writes what is printed to log.txt there has just made it, empty
        places = [self.folder / name for name in WRITTEN]
        foreign = [one.name for one in places if (one.stat().st_size if one.is_file() else folder_names(one))]
        own = any(self.folder.glob("checkpoints/*/config.json")) or "results_dir" in names_in(self.folder / "args.json")
        if foreign and not own:
            raise ValueError(f"{self.folder} holds {foreign[0]} of another program: give another --results-dir")
        self.lock.acquire(rename_folders=True)

    def start(self) -> None:
        """Open log.txt, create the accelerator, and seed the weights alike in every process.

        Raises ValueError as `create_accelerator` does.
        """
        args = self.args
        wait_for_all()  # rank 0 may have fetched networks of previews, for longer than NCCL waits
        if self.state.is_main_process and not self.resumed:
            write_json(self.folder / "args.json", vars(args))
        self.logger = create_logger(self.state, self.folder / "log.txt")
        self.accelerator, self.precision, sharded = create_accelerator(
            self.logger, self.precision, args.report_to, self.folder, self.first_step
        )
        self.sharded = sharded and self.state.num_processes > 1
        set_numerics(args.tf32)
        torch.manual_seed(args.global_seed)

    def adopt(self, model: torch.nn.Module) -> torch.nn.Module:
        """Train this module: --pretrained-path, EMA, compiling, sharding. Returns it, on the device.

        It has `blocks`, which are compiled and sharded one by one, and set_grad_checkpointing(bool).
        """
        args, self.pretrained, self.beside, self.called = self.args, None, {}, []
        self.module = model.to(self.device)
        assert model.config == self.config.built or plain(model.config, "the model's") == self.config.built
        with self.parser.one_line_errors():
            if args.pretrained_path and not self.resumed:
                train_only = vars(args).get("train_only")
                self.pretrained = load_pretrained(args.pretrained_path, model, self.config.process, train_only)
                self.ema_start = 0.0
        model.set_grad_checkpointing(args.checkpoint_activations)
        self.ema = deepcopy(model).requires_grad_(False).eval()
        if self.compiled:
            compile_blocks(model, self.device)
        if self.sharded:
            fully_shard_blocks(self.ema, self.device)
        self.model = self._to_call(model)
        self.weights, self.averages = list(model.parameters()), list(self.ema.parameters())
        self.lengths = PowerAverages(args.ema_lengths or (), dict(self.ema.named_parameters()), self.ema_images)
        return model

    def adopt_beside(self, name: str, module: torch.nn.Module) -> tuple[torch.nn.Module, Callable]:
        """Train this module, too: what only the loss needs, such as a projector of hidden tokens.

        It is no part of the model, and there is no average of it: {name}.safetensors of each checkpoint holds it, and
        nothing but the run itself reads that. Gradients are clipped apart from the model's, which so do not depend on
        it. Returns the module, on the device, and what to call.
        """
        self.beside[name] = module.to(self.device)
        return module, self._to_call(module)

    def _to_call(self, module):
        if self.sharded:
            fully_shard_blocks(module, self.device, self.precision)
        # sharded by us, it has only its autocast from accelerate, as a module for evaluation
        prepared = self.accelerator.prepare_model(module.train(), device_placement=False, evaluation_mode=self.sharded)
        self.called.append(prepared)
        return prepared

    def optimize(
        self,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        schedule: Callable,
        unit: str = "images",
    ) -> None:
        """Train with this optimizer, or these; then resume. Each group keeps its own learning rate, times
        schedule(args, step), which depends on nothing else: a resumed run goes on with it.

        unit: what a sample is, in the plural.
        """
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        for optimizer in self.optimizers:
            begin_groups(optimizer)
        self.schedule, self.rates = schedule, []  # those of the last step
        self.losses = Losses(unit)
        self.skips = SkippedSteps(self.optimizers, self.accelerator.scaler, self.device, self.skipped)
        with self.parser.one_line_errors():
            if self.resumed:
                self._load()
            done_by_rank_0(self.state, self._trim)  # a run that is refused keeps all that it has
        for group in self._groups():
            group.setdefault("initial_lr", group["lr"])

    def _groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _all_weights(self):
        return [*self.weights, *(weight for module in self.beside.values() for weight in module.parameters())]

    def _trained(self):
        """What a checkpoint saves."""
        self._share_buffers()
        more = {**self.lengths.files(), **{name: module.state_dict() for name, module in self.beside.items()}}
        rest = dict(optimizers=self.optimizers, scaler=self.accelerator.scaler, more=more)
        return dict(model=self.module, ema=self.ema, **rest)

    @torch.inference_mode()  # in which a preview may have made buffers of the EMA
    def _share_buffers(self):
        """Give the EMA the model's buffers of now, which are not averaged: counts, masks, running statistics."""
        for average, value in zip(self.ema.buffers(), self.module.buffers()):
            average.copy_(value)

    def _load(self):
        sums, names = load_checkpoint(self.resumed, **self._trained())
        if sums is None:
            return
        if len(sums) != self.state.num_processes:  # then process 0 has those of all
            sums = torch.stack([sums.sum(dim=0), *[torch.zeros_like(sums[0])] * self.state.process_index])
        self.losses.names, self.losses.values = tuple(names), sums[self.state.process_index].to(self.device)

    def _trim(self):
        """Remove what was written after the time from which the run resumes, and record how it goes on."""
        write_json(self.folder / "args.json", vars(self.args))
        trim_metrics(self.folder / "metrics.jsonl", self.first_step)
        if self.lengths.averages:
            trim_snapshots(self.folder, self.ema_images)
        remove_unfinished(self.folder)

    # ---------------------------------------------------------------------- the loop

    def steps(self, batches: Dataset, measured: Iterable["Measurement"] = ()) -> Iterator[tuple[int, Batch]]:
        """Each step's number, from 1, and this process's batch. Ends after the last step, or after a request to stop.

        Args:
            batches: a Dataset: batches[step] is a dict of tensors (n, ...) with n the same in all of them, or an
                OSError; first_of(step) is the sample index at which the step begins; last_step(epochs) is the last
                one's number; rows_per_epoch.
            measured: what is measured as training goes.

        Raises OSError, with a checkpoint if there was a step, for what made a process ask for the stop.
        """
        args, step, self.batches, self.measured = self.args, self.first_step, batches, measured
        self.last_step = max(steps_of_run(args, batches), step)
        self.checkpoints, self.saved = checkpoint_steps(args, self.last_step), None  # the last one's step
        if step < self.last_step:
            self._check_room()
        self.bar = announce(self)
        self.callback(self.bar.close)
        self.stop_request = StopRequest(self.deadline)
        self.postponed, self.stopped_by = False, None
        if step and not self._measure(step):
            self.stopped_by = self.stop_request.agreed()
        self.last_line = time.time(), step
        steps, pin = range(step, step if self.stopped_by else self.last_step), self.device.type == "cuda"
        for batch in load_batches(batches, steps, self.stop_request, args.num_workers, pin):
            if isinstance(batch, OSError):  # one of the first: there was no step to stop after
                raise batch
            step += 1
            yield step, batch
            if self.stopped_by:
                break
        self.bar.close()
        self.accelerator.end_training()
        if self.stop_request.reason:
            raise OSError(self.stop_request.reason)
        if self.stopped_by and step < self.last_step:
            self.logger.info(f"stopped by {self.stopped_by} after step {step:,}; the same command continues")
        for one in self.measured:
            one.conclude()

    def _check_room(self):
        """End the program with one line where the disk cannot hold a checkpoint."""
        moments = [2 if "betas" in group else bool(group.get("momentum")) for group in self._groups()]
        averages = (1 + len(self.lengths.averages)) * sum(weight.numel() for weight in self.weights)
        trained = sum(weight.numel() for weight in self._all_weights())
        size = 4 * (averages + trained * (1 + sum(moments) / len(moments)))
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize if disk.f_blocks else math.inf  # 0: it does not say
        inodes = disk.f_favail if disk.f_files else INODES
        if self.state.is_main_process and (free < size or inodes < INODES):
            self.parser.error(
                f"--results-dir {self.folder}: a checkpoint takes about {size / 1e9:.2g} GB and a few inodes, and the "
                f"disk has {free / 1e9:.2g} GB and {inodes:,} inodes: make room, or give a folder on another disk"
            )

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """The --grad-accum parts of a batch, on the device. Gradients are all-reduced only after the last one."""
        self.step_sums = None
        parts = list(zip(*(tensor.split(self.micro_batch_size) for tensor in batch.values())))
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.ExitStack() as unsynced:
                for module in self.called:
                    if self.sharded:
                        module.set_requires_gradient_sync(last)
                    elif not last:
                        unsynced.enter_context(self.accelerator.no_sync(module))
                yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in zip(batch, part)}

    def backward(self, terms: dict[str, torch.Tensor], t: torch.Tensor, num_timesteps: int) -> None:
        """Accumulate the gradients of a micro-batch's mean loss, and its sums for the log: see `Losses`."""
        self.accelerator.backward(terms["loss"].mean() / self.args.grad_accum)
        dropped = self.losses.begin(terms)
        if dropped:
            changed = f"the loss has the terms {', '.join(self.losses.names)}, no longer {', '.join(dropped)}"
            if self.rates or self.step_sums is not None:
                self.parser.error(f"{changed}: let it return each of them at every step")
            self.logger.info(f"{changed}: the next line of the log covers only the steps from here")
        sums = self.losses.of_batch(terms, t, num_timesteps)
        self.step_sums = sums if self.step_sums is None else self.step_sums + sums

    def update(self, step: int) -> None:
        """Clip the gradients, take the optimizers' step and update the EMA, unless the fp16 scaler skips the step.

        Only the device knows whether it does; the CPU does not wait to find out.
        """
        args, scaler = self.args, self.accelerator.scaler
        if step == self.first_step + 1:
            self._refuse_unreached()
        if self.rates and self.rates != [group["lr"] for group in self._groups()]:
            self.parser.error(
                "something else than the run, such as a scheduler of torch, changed a learning rate, and a resumed run "
                "would not: give Run.optimize the schedule, a function of the step"
            )
        for group in self._groups():
            group["lr"] = group["initial_lr"] * float(self.schedule(args, step))
        self.rates = [group["lr"] for group in self._groups()]
        self.grad_norm = torch.tensor(math.nan)  # not computed unless it is used
        if args.grad_clip or step % args.log_every == 0 or step == self.last_step:
            if scaler:
                for optimizer in self.optimizers:
                    scaler.unscale_(optimizer)
            self.grad_norm = clip_gradients(self.weights, args.grad_clip)
            for module in self.beside.values():
                clip_gradients(list(module.parameters()), args.grad_clip)
        self.skips.step()
        if step == self.first_step + 1:
            self._refuse_unrecordable()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        decay = ema_decay(args, step)
        update_ema(local_shards(self.averages), local_shards(self.weights), decay, self.skips.last)
        self.ema_start *= decay
        self.lengths.update(local_shards(self.weights), args.global_batch_size, self.skips.last)
        skipped = self.skips.last
        self.losses.values += self.step_sums if skipped is None else self.step_sums.masked_fill(skipped, 0)
        self.bar.update()

    def _refuse_unreached(self):
        """End the program with one line where DDP would wait for a gradient that the loss does not have."""
        if self.state.num_processes == 1 or self.sharded:
            return
        unreached = [name for name, one in self.module.named_parameters() if one.requires_grad and one.grad is None]
        if unreached:
            self.parser.error(
                f"no gradient reaches {len(unreached)} parameters, {', '.join(unreached[:3])} for example: several "
                "processes would wait for it; freeze them with requires_grad_(False), or use them in the loss"
            )

    def _refuse_unrecordable(self):
        """End the program with one line where the first checkpoint would hold a state that cannot be read again."""
        for optimizer in self.optimizers:
            fault = unrecordable(optimizer.state_dict())
            if fault:
                self.parser.error(
                    f"the state of {type(optimizer).__name__} holds {fault}, which a checkpoint does not give back: "
                    "keep tensors and plain numbers"
                )

    def report(self, step: int) -> None:
        """Measure, log, save, agree on stopping, each if due. Ends the program if numbers are not finite."""
        self._measure(step)  # before a checkpoint, so that a resumed run has the same measurements
        args, stopped_by = self.args, self.stop_request.agreed()
        log_due, ending = step % args.log_every == 0, step == self.last_step or stopped_by
        first, every = self.checkpoints
        checkpoint_wanted, longest = self.postponed or step == first or step % every == 0, 0
        if log_due or checkpoint_wanted or ending:
            self.skipped, in_a_row, longest = self.skips.read()
            # never in the middle of a streak of skipped steps, unless at the end: the run may be about to abort
            self.postponed = checkpoint_wanted and in_a_row > 0
        checkpoint_due = (checkpoint_wanted and not self.postponed) or ending
        means = failure = None
        if log_due or checkpoint_due:
            means = self.losses.means(self.accelerator.reduce(self.losses.values, "sum"))
            failure = self._not_finite(step, means, checkpoint_due)
        if log_due or step == self.last_step or failure:
            write_line(self, step, means, log_due, failure)
        if log_due:  # even after a stop, so that a resumed run has the same lines
            self.losses.values.zero_()
            self.skips.begin_line()
            self.last_line, self.logged, self.skipped = (time.time(), step), step, 0
        if longest >= args.max_nonfinite:
            failure = f"step {step}: {longest} steps in a row without a finite gradient"
        if failure:
            self.logger.error(
                f"{failure}; stopped. The last good checkpoint: {(run_checkpoints(self.folder) or ['none'])[-1]}"
            )
            self.accelerator.end_training()
            self.parser.exit(1)
        if self._snapshot_due(step):
            self._snapshot(step)
        if checkpoint_due:
            self._save(step)
            self.saved = step
        self.stopped_by = stopped_by

    def _measure(self, step):
        """Take the measurements that are due. Returns whether a request to stop left them whole."""
        for one in self.measured:
            if one.is_due(step):
                one.measure(step)
                if one.is_due(step):
                    self.logger.info(f"step {step:,}: a stop cut off a measurement; the same command makes it first")
                    return False
        return True

    def _snapshot_due(self, step):
        """Whether the images of this step, skipped ones counted, complete another --ema-snapshot-every; or it ends."""
        if not self.lengths.averages:
            return False
        every = self.args.ema_snapshot_every or max(1, self.batches.first_of(self.last_step) // 32)
        after, before = (self.batches.first_of(one) // every for one in (step, step - 1))
        return after > before or step == self.last_step

    def _snapshot(self, step):
        """Store the averages of --ema-lengths. Every process calls this."""
        self._share_buffers()
        buffers = {name: value for name, value in self.ema.state_dict().items() if name not in self.lengths.names}
        images = int(self.lengths.images)
        for length in self.lengths.averages:
            weights = gather_full({**buffers, **self.lengths.named(length)}, self.state.is_main_process)
            if self.state.is_main_process and images:
                self.record(write_snapshot, self.folder, images, length, step, weights)

    def _not_finite(self, step, means, checkpoint_due):
        """Why the run must end, in words, else None."""
        # the fp16 scaler skips a step with such a loss; nothing else fixes it, and no checkpoint may hold it
        if not math.isfinite(means["loss"]) and self.skipped < step - self.logged:
            return f"step {step}: the loss is {means['loss']}"
        if checkpoint_due:  # a gradient may be infinite though the loss is finite
            norms = torch.stack(torch._foreach_norm(local_shards(self._all_weights())))
            if self.accelerator.reduce((~norms.isfinite()).sum(), "sum").item():
                return f"step {step}: there are weights that are not finite"

    def meta(self, step: int) -> RunMeta:
        """What a checkpoint of this step records of the run."""
        progress = dict(step=step, place=self.batches.first_of(step), logged=self.logged, skipped=self.skips.read()[0])
        if self.lengths.averages:
            progress["ema_images"] = int(self.lengths.images)
        return RunMeta.of_run(*self.recorded, ema_start=self.ema_start, **progress)

    def _save(self, step):
        args, meta = self.args, self.meta(step)
        sums = self.accelerator.gather(self.losses.values.unsqueeze(0)).cpu()  # (processes, …)
        state = dict(self._trained(), sums=sums, losses=self.losses.names)
        path = save_checkpoint(self.folder, self.config, meta, **state, write=self.state.is_main_process)
        if self.state.is_main_process:
            self.logger.info(f"checkpoint {path}")
            if args.ckpt_total_limit:
                remove_old_checkpoints(self.folder, args.ckpt_total_limit)
            self.record(draw_losses, read_metrics(self.folder / "metrics.jsonl"), self.folder / "loss.png")
        wait_for_all()

    # ---------------------------------------------------------------------- beside the loop

    def record(self, write: Callable, *values) -> None:
        """write(*values). If the disk does not take it, ask for a stop: there may still be room for a checkpoint."""
        try:
            write(*values)
        except torch.OutOfMemoryError:
            warn_once(f"memory of {write.__name__}", f"{write.__name__} is left out: the GPU's memory is full")
        except OSError as error:
            self.stop_request.ask(str(error))

    def note(self, line: dict, words: str, tracked: Mapping[str, float] | None = None, kept: bool = True) -> None:
        """Write a line to metrics.jsonl, if it is `kept`, what is `tracked` to the tracker, and words to the log."""
        if self.state.is_main_process and kept:
            self.record(append_metrics, self.folder / "metrics.jsonl", line)
        if self.args.report_to and tracked:
            self.accelerator.log(tracked, line["step"])
        self.logger.info(f"step {line['step']:,}: {words}")

    def preview_due(self, step: int) -> bool:
        """Whether to draw a preview after this step: by --sample-every, and at the end; not in the hurry of a stop."""
        every, ending = self.args.sample_every, step == self.last_step
        if self.stopped_by:
            return False
        return self.saved == step if every is None else every > 0 and (ending or step % every == 0)

    @contextlib.contextmanager
    def whole_ema(self, everywhere: bool = False) -> Iterator[torch.nn.Module | None]:
        """The EMA, to look at: in rank 0, and if wanted `everywhere` in every process; else None.

        Every process calls this: a sharded EMA is gathered as a whole, and given back. torch alone would keep what the
        network used, and use these old weights the next time.

        `go_on` ends the block where a stop is asked for: what it makes is to be written at its end, or not at all.
        """
        self._share_buffers()
        self.together, sharded = everywhere, [part for part in self.ema.modules() if hasattr(part, "unshard")]
        for part in sharded:
            part.unshard()
        try:
            yield self.ema if self.state.is_main_process or everywhere else None
        except Stopped:
            pass
        finally:
            for part in sharded:
                part.reshard()

    def go_on(self, *_) -> None:
        """Raise Stopped where a stop is asked for. Called between the batches of a block of `whole_ema`, by all
        processes that have the EMA."""
        request = self.stop_request
        if request.agreed() if self.together else request.here():
            raise Stopped
