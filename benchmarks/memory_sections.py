"""What docs/benchmarks.md says about engine states, 4-bit weights and 8-bit moments."""

from typing import Any

from coconut_ds.tables import Table

MB = 1e6


def engine_text(result: Any) -> str:
    rows = []
    for record in result["records"]:
        cells = [f"{record['case']}{', two ranks' * (record['ranks'] == 2)}"]
        for part in ("states", "backward", "step"):
            planned, measured = (record[f"{kind}_{part}"] for kind in ("planned", "measured"))
            cells.append(
                f"{planned / MB:,.2f} / {measured / MB:,.2f}, {100 * (planned / measured - 1):+.1f} %"
            )
        on_host = [
            (record[key] - record["on_gpu"]) / record["share"]
            for key in ("planned_states", "measured_states")
        ]
        cells.append(" / ".join(f"{size:.2f}" for size in on_host) if on_host[0] else "")
        rows.append(cells)
    head = ("MB, planned / measured", "states", "backward beyond", "step beyond", "host bytes a parameter")
    return Table(head, rows).markdown()


def quantized_text(result: Any) -> str:
    rows = []
    for record in result["records"]:
        planned, measured = record["planned_and_measured_mib"]["total"]
        resumed = f"{record['steps_after_resume']} of {record['steps']} steps"
        forms = [f"{record[key]:.1g}" for key in record if key.endswith("_difference")]
        rows.append(
            (
                f"{record['model']}, {record['kind']}{', two ranks' * (record['ranks'] == 2)}",
                f"{'equal' if record['equal'] else 'DIFFERENT'}, {resumed}",
                f"{record['first_loss']:.3f} to {record['last_loss']:.3f}",
                f"{record['step_seconds']:.2f}",
                f"{', '.join(forms)} of {record['largest_logit']:.0f}",
                f"{planned:,.1f}",
                f"{measured:,.1f}",
                f"{100 * (planned / measured - 1):+.1f} %",
            )
        )
    head = ("run", "after kill and resume", "loss", "seconds a step", "logits of the export differ by")
    return Table((*head, "planned MiB", "measured MiB", "error"), rows).markdown()
