"""`tune records`: look into the record store, move records to TVM's files and back, prune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from gpu_aware_tune.cli.options import CONTEXT, DIRECTORY, Command, db_option
from gpu_aware_tune.cli.record_rows import (
    BEST_FIELDS,
    COUNT_FIELDS,
    TRIAL_FIELDS,
    Row,
    best_row,
    key_row,
    show,
    trial_row,
)
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.records.repair import Findings, check_store, repair_store
from gpu_aware_tune.records.store import Counts, Store, damaged_text
from gpu_aware_tune.settings import TARGETS


def choice_options(command: Command) -> Command:
    """Add what chooses among the keys of a store, and the form of the answer."""
    for option in (
        click.option(
            "--csv", "csv_file", metavar="FILE|-", help="Write CSV; - is standard output."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print a JSON list."),
        click.option(
            "--units", type=click.IntRange(1), help="Only this many units (SMs or cores)."
        ),
        click.option("--device", help="Only devices whose name contains this."),
        click.option("--task", help="Only tasks whose name contains this or whose hash begins so."),
        db_option,
    ):
        command = option(command)
    return command


@click.group(context_settings=CONTEXT)
def records() -> None:
    """List, export, import, prune, check and repair measurements."""


@records.command("list", context_settings=CONTEXT)
@click.option("--trials", is_flag=True, help="One row a trial instead of one row a task.")
@choice_options
def list_command(
    db: Path,
    task: str | None,
    device: str | None,
    units: int | None,
    as_json: bool,
    csv_file: str | None,
    trials: bool,
) -> None:
    """Show what the store holds: tasks, devices, best kernels, trials, failures."""
    with Store(db, readonly=True) as store:
        chosen = choose(store.counts(), task, device, units)
        if trials:
            rows: list[Row] = [
                trial_row(counts, record) for counts in chosen for record in store.all(counts.key)
            ]
        else:
            rows = [key_row(counts) for counts in chosen]
        tell_damaged(store)
    fields = TRIAL_FIELDS if trials else COUNT_FIELDS
    show(rows, fields, as_json, csv_file, hidden=("failure_text", "tvm", "target", "run"))


@records.command("best", context_settings=CONTEXT)
@click.option("-k", "count", type=click.IntRange(1), default=1, help="So many per task.")
@choice_options
def best_command(
    db: Path,
    task: str | None,
    device: str | None,
    units: int | None,
    as_json: bool,
    csv_file: str | None,
    count: int,
) -> None:
    """Show the best kernel of each task; JSON and CSV include its trace."""
    with Store(db, readonly=True) as store:
        rows = [
            best_row(counts, place, record)
            for counts in choose(store.counts(), task, device, units)
            for place, record in enumerate(store.best(counts.key, count), start=1)
        ]
        tell_damaged(store)
    show(rows, BEST_FIELDS, as_json, csv_file, hidden=("trace", "tvm", "target"))


@records.command("export", context_settings=CONTEXT)
@click.argument("folder", metavar="DIR", type=DIRECTORY)
@click.option("--device", help="The device whose records to export, where there are several.")
@click.option("--units", type=click.IntRange(1), help="Likewise, the number of units.")
@click.option("--tvm", "tvm_version", metavar="VERSION", help="Likewise, the version of TVM.")
@click.option("--force", is_flag=True, help="Replace files that are in DIR.")
@db_option
def export_command(
    folder: Path,
    device: str | None,
    units: int | None,
    tvm_version: str | None,
    force: bool,
    db: Path,
) -> None:
    """Write usable records as TVM's JSON database, of one device and number of units.

    Load it with tvm.s_tir.meta_schedule.database.JSONDatabase(work_dir="DIR").
    """
    with Store(db, readonly=True) as store:
        from gpu_aware_tune.records.tvm_database import export_tvm

        moved = export_tvm(store, folder, device, units, tvm_version, overwrite=force)
    text = f"{moved.records} records of {moved.tasks} tasks -> {folder}"
    if moved.skipped:
        text += f"; {moved.skipped} tasks left out, their modules are not in the store"
    click.echo(text)


@records.command("import", context_settings=CONTEXT)
@click.argument("folder", metavar="DIR", type=DIRECTORY)
@click.option("--device", help="What they were measured on; this machine's device by default.")
@click.option("--units", type=click.IntRange(1), help="On how many units; all by default.")
@click.option("--target", type=click.Choice(TARGETS), default="auto", help="This machine's device.")
@click.option("--tvm", "tvm_version", metavar="VERSION", help="With which TVM, if not the writer.")
@db_option
def import_command(
    folder: Path,
    device: str | None,
    units: int | None,
    target: str,
    tvm_version: str | None,
    db: Path,
) -> None:
    """Add the records of TVM's JSON database in DIR; what is known already stays as it is.

    TVM's files do not say what they were measured on, so give --device and --units where that was
    not this machine and all of it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with TVM's JSON database")
    if device is None or units is None:
        from gpu_aware_tune.partition import find_device

        here, note = find_device(target, 0, None)
        if device is None and note:
            click.echo(note, err=True)
        if device not in (None, here.key):
            raise UserError(f"--device {device} is not this machine's {here.key}; give --units too")
        device, units = here.key, units or here.units_total
    from gpu_aware_tune.records.tvm_database import import_tvm

    with Store(db) as store:
        moved = import_tvm(store, folder, device, units, tvm_version)
    text = f"{moved.records} records and {moved.failures} failures of {moved.tasks} tasks"
    text += f", taken as measured on {device} with {units} units -> {db}"
    if moved.skipped:
        text += f"; {moved.skipped} lines left out, their trace or target cannot be read"
    click.echo(text)


@records.command("prune", context_settings=CONTEXT)
@click.option("--keep", type=click.IntRange(0), help="Keep the best N of each task and share.")
@click.option("--failures", is_flag=True, help="Remove failures; they may then be tried again.")
@click.option("--older-than", type=click.FloatRange(0), metavar="DAYS", help="Only such failures.")
@click.option("--wrong", is_flag=True, help="Remove kernels found to compute wrong numbers.")
@click.option("--dry-run", is_flag=True, help="Only say how many records would go.")
@db_option
def prune_command(
    keep: int | None,
    failures: bool,
    older_than: float | None,
    wrong: bool,
    dry_run: bool,
    db: Path,
) -> None:
    """Remove records and give their room back; untuned baselines always stay."""
    if older_than is not None and not failures:
        raise UserError("--older-than chooses among failures; give --failures too")
    if keep is None and not failures and not wrong:
        raise UserError("nothing to prune; give --keep N, --failures or --wrong")
    oldest_s = (older_than or 0.0) * 86400 if failures else None
    # A writer would create what is missing; opened for reading first, the store says so instead.
    with Store(db, readonly=True) as store:
        total = sum(counts.trials for counts in store.counts())
        removed = store.prune(keep, oldest_s, wrong, dry_run=True)
    if not dry_run:
        with Store(db) as store:
            removed = store.prune(keep, oldest_s, wrong)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{removed} of {total} records {verb}")


@records.command("check", context_settings=CONTEXT)
@db_option
def check_command(db: Path) -> None:
    """Read every row of the store and say which are damaged; exit code 3 where any is."""
    found = check_store(db)
    click.echo(findings_text(found))
    if any(finding.damaged for finding in found.values()):
        raise SetupError(
            f"{db} has damaged rows, which are left out: remove them with"
            f" tune records repair --db {db}"
        )


@records.command("repair", context_settings=CONTEXT)
@db_option
def repair_command(db: Path) -> None:
    """Write the store anew with every row that is sound; the old file stays beside it."""
    found, old = repair_store(db)
    click.echo(f"{findings_text(found)}\nthe old file is {old}")


def tell_damaged(store: Store) -> None:
    """Say on stderr how many rows were left out, where any were."""
    if store.damaged:
        click.echo(f"warning: {damaged_text(store)}", err=True)


def findings_text(found: Findings) -> str:
    """One line: how many rows of each table are sound, and how many are not."""
    return ", ".join(
        f"{finding.sound} {table}" + (f" ({finding.damaged} damaged)" if finding.damaged else "")
        for table, finding in found.items()
    )


def choose(
    found: Sequence[Counts], task: str | None, device: str | None, units: int | None
) -> list[Counts]:
    """Return the keys that the command line asks for."""
    return [
        counts
        for counts in found
        if (task is None or task in counts.name or counts.key.task.startswith(task))
        and (device is None or device.lower() in counts.key.device.lower())
        and units in (None, counts.key.units)
    ]
