"""Renders the templates of this folder with Python's jinja2 in Hugging Face's settings.

Usage: python3 make.py (needs jinja2 >= 3.1). Writes renders.json: template -> case -> text, or
"ERR message" where the template raises.
"""

import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

here = pathlib.Path(__file__).parent


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


env = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
env.filters["tojson"] = tojson
class Generation(jinja2.ext.Extension):
    """`{% generation %}` renders its body, as transformers does."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


env.add_extension(Generation)
env.globals["raise_exception"] = raise_exception
env.globals["strftime_now"] = lambda pattern: {"%d %b %Y": "02 Jan 2025", "%Y-%m-%d": "2025-01-02"}[pattern]

cases = json.loads((here / "cases.json").read_text())
renders = {}
for path in sorted(here.glob("*.jinja")):
    renders[path.name] = {}
    for name, context in cases.items():
        try:
            text = env.from_string(path.read_text()).render(**context)
        except Exception as e:  # Templates raise what they like.
            text = f"ERR {e}"
        renders[path.name][name] = text
(here / "renders.json").write_text(json.dumps(renders, indent=1, ensure_ascii=False) + "\n")
