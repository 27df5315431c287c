"""YAML as text: a comment at the top, then documents, fields in the order in which they were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def document(head: str, *objects: Mapping[str, Any]) -> str:
    """``objects`` as one YAML file; ``head`` becomes comment lines."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    return comment + "---\n".join(yaml.dump(item, Dumper=_Plain, sort_keys=False, width=120) for item in objects)


class _Plain(yaml.SafeDumper):
    """Without anchors, which tools differ on; texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)
