"""Rules of adapters that are served side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.rules.known import Known


def adapters_are_named(known: Known) -> Iterator[Problem]:
    """Each has a name that a request can give, and a folder."""
    for name, folder in known.plan.serve.adapters.items():
        path, value = f"serve.adapters.{name}", json.dumps(folder)
        if not name or not name.isprintable() or name != name.strip():
            rule = "its name must have letters and none that cannot be seen"
            yield Problem(path, value, rule, "requests name it in their `model` field")
        if not folder:
            yield Problem(path, value, "must be a folder", "the adapter's, as `peft` writes it")


def adapters_stay_whole(known: Known) -> Iterator[Problem]:
    """They are computed where every layer is whole, and by products that heed the batch."""
    serve = known.plan.serve
    if not serve.adapters:
        return
    ways = {f"serve.mesh.{axis} = 1": getattr(serve.mesh, axis) > 1 for axis in ("tp", "pp", "ep")}
    ways["serve.batch_invariant = false"] = serve.batch_invariant
    for instead, is_other in ways.items():
        if is_other:
            rule = f"is not built in this version without {instead}"
            hint = f"set {instead}, or merge one adapter: --adapter FOLDER"
            yield Problem("serve.adapters", json.dumps(dict(serve.adapters)), rule, hint)
