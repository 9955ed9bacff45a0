"""`s2d models`: the served models; loading and unloading them while the server runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
import yaml
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from cluster.cli.admin import change
from cluster.cli.common import DEFAULT_URL, ApiKey, HttpUrl, err, fail, out
from cluster.cli.status import fetch, yes
from cluster.config import ModelConfig

models = typer.Typer(help="The served models; load and unload them.", invoke_without_command=True)
POLL_S = 0.5


@models.callback()
def show(context: typer.Context, url: HttpUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """The served models."""
    if context.invoked_subcommand is not None:
        return
    table = Table("model", "ready", "state", "context", "dtype", "architecture", "drafters")
    for model in listed(url, api_key):
        table.add_row(
            escape(model["id"]),
            yes(model["ready"]),
            model["state"],
            str(model["max_model_len"] or "-"),
            model["dtype"] or "-",
            escape(model["architecture"] or "-"),
            ", ".join(model["drafters"]),
        )
    out.print(table)


def listed(url: str, api_key: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fetch(url, "/v1/models", api_key)["data"]
    return found


@models.command()
def load(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML of one model, as an entry of `models` in a cluster's."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients put into `model`.")] = None,
    source: Annotated[str | None, typer.Option(help="Folder, hub id, GGUF file or package:NAME.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, int8 or float32.")] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until it is ready; 0: none.")] = 900.0,
    url: HttpUrl = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Load a model into a running server. Nothing else is restarted."""
    model = read_model(config, {"name": name, "source": source, "dtype": dtype})
    change("POST", url, "/admin/models", api_key, model.model_dump(mode="json", exclude_unset=True))
    deadline = time.monotonic() + wait
    with err.status(f"loading {escape(model.name)}"):
        while time.monotonic() < deadline:
            state = next((m["state"] for m in listed(url, api_key) if m["id"] == model.name), "starting")
            if state in ("ready", "asleep"):
                out.print(f"{escape(model.name)} is {state}")
                return
            if state == "failed":
                raise fail(f"{model.name} did not start: see `s2d status` and Ray's logs")
            time.sleep(POLL_S)
    if wait > 0:
        raise fail(f"{model.name} is not ready after {wait:g} s; it goes on loading")
    out.print(f"{escape(model.name)} is being loaded")


@models.command()
def unload(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    url: HttpUrl = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Unload a model that was loaded so. Its running requests end first."""
    answer = change("DELETE", url, f"/admin/models/{quote(name, safe='')}", api_key, None)
    if answer["state"] == "unloading":
        out.print(f"{escape(name)} is being unloaded")
    else:
        out.print(f"what was loaded as {escape(name)} is being unloaded; that of the configuration stays")


def read_model(path: Path | None, options: dict[str, str | None]) -> ModelConfig:
    """The file's model with what the options override; ends the program with one line for what is wrong."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else {}
        if not isinstance(data, dict):
            raise fail(f"{path}: the description of one model is needed")
        model = ModelConfig.model_validate(data | {k: v for k, v in options.items() if v is not None})
        return model if path is None else model.found_from(path.parent)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise fail(f"{path or 'options'}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except yaml.YAMLError as error:
        raise fail(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise fail(f"{path}: {error.strerror or error}") from error
