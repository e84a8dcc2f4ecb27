"""The page's style: light and dark by the reader's setting, always light on paper."""

from __future__ import annotations

from gpu_aware_tune.report.drawing import DARK, LIGHT, Colors


def style() -> str:
    """Return the style sheet; the figures use the same variables."""
    return (
        f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
        f"{_RULES}"
    )


def _variables(colors: Colors) -> str:
    return " ".join(f"--{role}: {color};" for role, color in colors.items())


_RULES = """\
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem;
  background: var(--surface); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; padding-top: .8rem; border-top: 1px solid var(--grid); }
p { margin: .3rem 0 .8rem; max-width: 48rem; }
.lead { font-size: 1.2rem; margin: .2rem 0; max-width: none; }
.lead b { white-space: nowrap; }
.note, .meta, figcaption, .missing { color: var(--muted); }
.meta, figcaption { font-size: .875rem; }
figure { margin: .6rem 0 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { max-width: 48rem; margin-top: .25rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .75rem .22rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
thead th {
  color: var(--muted); font-weight: 600; vertical-align: bottom;
  border-bottom: 1px solid var(--muted);
}
tbody td, tbody th { border-bottom: 1px solid var(--grid); }
tbody th { font-weight: 400; }
.text { text-align: left; }
.wide { white-space: normal; overflow-wrap: anywhere; }
.group { text-align: center; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 36rem) { body { padding: 1rem .9rem 3rem; } }
@media print {
  @page { margin: 14mm; }
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  figure, .scroll { overflow: visible; }
  figure, tr, .missing { break-inside: avoid; }
  figure svg { min-width: 0; }
  h2, thead { break-after: avoid; }
  table { font-size: 7.5pt; }
}
"""
