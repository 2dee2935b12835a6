"""The commands that work through a Ray cluster's Jobs API: submit jobs logs stop."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.cli.groups import BUILD
from jobs.cli.options import AddressOption, AllowOpenOption, HeaderOption, JsonOption, SetOption, WideOption
from jobs.output.render import print_json, print_table
from schemas.stages import STAGES

cluster = typer.Typer()
_Job = Annotated[str, typer.Argument(help="As `capfilt jobs` lists it.", metavar="JOB", show_default=False)]


@cluster.command(rich_help_panel=BUILD)
def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(help=f"After --: run, {', '.join(STAGES)}, verify or pretrain, with options."),
    ],
    config: Annotated[str, typer.Option("-c", "--config", help="The corpus's TOML file.", metavar="FILE")],
    set_: SetOption = None,
    address: AddressOption = "",
    header: HeaderOption = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the job's log and exit with its code.")
    ] = True,
    allow_open: AllowOpenOption = False,
    print_: Annotated[
        Literal["job", "rayjob"] | None,
        typer.Option("--print", help="Only print it: for the Jobs API (JSON), or for KubeRay (YAML)."),
    ] = None,
    queue: Annotated[str, typer.Option(help="Of Kueue, for --print rayjob.", metavar="NAME")] = "",
) -> None:
    """Run a command as a job on a Ray cluster. Submitting the same twice is harmless."""
    from jobs.cluster.submit import load_job, submit_job

    loaded = load_job(config, set_ or [], arguments)
    if print_:
        print(_rayjob(loaded, arguments, queue) if print_ == "rayjob" else _job(loaded, arguments), end="")
        return
    code = submit_job(loaded, arguments, address, header or [], allow_open=allow_open, follow=follow)
    raise typer.Exit(code)


def _rayjob(config: Any, arguments: list[str], queue: str) -> str:
    import yaml

    from jobs.cluster.kubernetes import rayjob

    return yaml.safe_dump_all(rayjob(config, arguments, queue), sort_keys=False)


def _job(config: Any, arguments: list[str]) -> str:
    """Return what would be sent to the Jobs API, as JSON."""
    from jobs.cluster.submit import job_of, submission_id

    job = job_of(config, arguments, submission_id(config, arguments), Path(), to_show=True)
    return json.dumps(job, indent=1) + "\n"


@cluster.command(rich_help_panel=BUILD)
def jobs(
    address: AddressOption = "",
    header: HeaderOption = None,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """List the jobs of a Ray cluster, the latest first."""
    from jobs.cluster.jobs_api import jobs_client, list_jobs

    rows = list_jobs(jobs_client(address, header or []))
    print_json(rows) if json_ else print_table(rows, wide=wide)


@cluster.command(rich_help_panel=BUILD)
def logs(
    job: _Job,
    address: AddressOption = "",
    header: HeaderOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends; exit with its code.")] = False,
) -> None:
    """Print the log of a submitted job."""
    from jobs.cluster.jobs_api import jobs_client, show_log

    raise typer.Exit(show_log(jobs_client(address, header or []), job, follow))


@cluster.command(rich_help_panel=BUILD)
def stop(job: _Job, address: AddressOption = "", header: HeaderOption = None) -> None:
    """Stop a submitted job in order; the same command goes on later."""
    from jobs.cluster.jobs_api import jobs_client, stop_job

    print(f"{job}: {stop_job(jobs_client(address, header or []), job)}")
