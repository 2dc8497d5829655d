"""The page of the demo: one file, no network, pictures as inline SVG."""

import html

STYLE = """
:root { color-scheme: light; --ink: #1f2630; --soft: #5b6675; --line: #dfe4ea; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 40px 0 12px; }
.lead { color: var(--soft); margin: 0 0 28px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 16px; }
.answers h3 { margin: 0 0 6px; font-size: 13px; font-weight: 600; color: var(--soft); }
.answers p { margin: 0; font-size: 18px; }
.verdict { margin-top: 8px !important; font-size: 13px !important; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
thead th { font-size: 13px; color: var(--soft); }
.sub td:first-child { padding-left: 20px; color: var(--soft); }
.notes { color: var(--soft); font-size: 14px; padding-left: 18px; }
svg { display: block; width: 100%; height: auto; }
@media (max-width: 640px) { .answers { grid-template-columns: 1fr; } }
"""


def number(value, digits):
    return "%.*f" % (digits, value)


def bar_chart(plain, packed):
    """Resident cache, one bar each, to one scale."""
    most = max(plain["kv_resident_mib"], packed["kv_resident_mib"], 1e-9)
    parts = []
    for i, (result, colour) in enumerate(((plain, "#9aa7b6"), (packed, "#215294"))):
        y, width = 8 + 44 * i, 700 * max(result["kv_resident_mib"], 0) / most
        parts.append(
            '<text x="0" y="%d" font-size="15">%s</text>' % (y + 20, html.escape(result["cache"]))
        )
        parts.append(
            '<rect x="130" y="%d" width="%.1f" height="30" rx="3" fill="%s"/>'
            % (y, max(width, 2), colour)
        )
        parts.append(
            '<text x="%.1f" y="%d" font-size="15" font-weight="600">%.1f MiB</text>'
            % (140 + width, y + 20, result["kv_resident_mib"])
        )
    return (
        '<svg viewBox="0 0 960 96" font-family="system-ui, sans-serif" fill="#1f2630" role="img" '
        'aria-label="Resident KV cache">%s</svg>' % "".join(parts)
    )


def answers(report):
    cards = []
    for result in report["results"]:
        verdict = "right" if result["right"] else "wrong"
        cards.append(
            '<div class="card"><h3>%s</h3><p>%s</p><p class="verdict">%s</p></div>'
            % (html.escape(result["cache"]), html.escape(result["answer"]), verdict)
        )
    return '<div class="answers">%s</div>' % "".join(cards)


def rows(report):
    plain, packed = report["results"]
    stats = packed["stats"]
    return [
        (
            "",
            "KV cache resident, measured (MiB)",
            number(plain["kv_resident_mib"], 1),
            number(packed["kv_resident_mib"], 1),
        ),
        ("sub", "its peak", number(plain["kv_peak_mib"], 1), number(packed["kv_peak_mib"], 1)),
        ("sub", "by sparkv's own account", "", number(stats["resident_bytes"] / 2**20, 1)),
        ("", "Bits per element, keys", "16.00", number(stats["keys_bits_per_element"], 2)),
        ("", "Bits per element, values", "16.00", number(stats["values_bits_per_element"], 2)),
        (
            "",
            "Prefill, tokens per second",
            number(plain["prefill_tokens_per_second"], 1),
            number(packed["prefill_tokens_per_second"], 1),
        ),
        (
            "",
            "Decode, tokens per second",
            number(plain["decode_tokens_per_second"], 1),
            number(packed["decode_tokens_per_second"], 1),
        ),
        ("", "Mean KL to f16 over the answer (nats)", "0", number(packed["mean_kl"], 4)),
    ]


def render(report, saliency_svg):
    plain, packed = report["results"]
    body = "".join(
        '<tr class="%s"><td>%s</td><td>%s</td><td>%s</td></tr>' % (kind, html.escape(label), a, b)
        for kind, label, a, b in rows(report)
    )
    share = packed["kv_resident_mib"] / max(plain["kv_resident_mib"], 1e-9)
    return """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sparkv demo</title><style>%s</style></head><body><main>
<h1>The same question, with %.0f %% of the cache memory</h1>
<p class="lead">%s answers from a document of %s tokens (%s), once with llama.cpp's f16 cache and
once with the packed cache of sparkv, in the same unmodified llama-server. %d threads, context
%s.</p>
<div class="card"><strong>%s</strong></div>
%s
<h2>Memory of the KV cache</h2>
<div class="card">%s</div>
<h2>Numbers</h2>
<div class="card"><table><thead><tr><th></th><th>%s</th><th>%s</th></tr></thead>
<tbody>%s</tbody></table></div>
<h2>What was kept</h2>
<div class="card">%s</div>
<h2>How it was measured</h2>
<ul class="notes">%s<li>%s</li></ul>
</main></body></html>
""" % (
        STYLE,
        100 * share,
        html.escape(report["model"]),
        format(report["document_tokens"], ","),
        html.escape(report["document"]),
        report["threads"],
        format(report["context"], ","),
        html.escape(report["question"]),
        answers(report),
        bar_chart(plain, packed),
        html.escape(plain["cache"]),
        html.escape(packed["cache"]),
        body,
        saliency_svg,
        "".join("<li>%s</li>" % html.escape(note) for note in report["notes"]),
        html.escape(packed["stats"].get("config", "")),
    )
