"""The command: verbs put together, and mistakes told in one sentence."""

import sys

import typer

from gemscope.errors import InputError

from . import (
    _catalog,
    _check,
    _circuit,
    _cluster,
    _compare,
    _convert,
    _demo,
    _doctor,
    _dose,
    _download,
    _eval,
    _explain,
    _export_site,
    _feature,
    _graph,
    _harvest,
    _heads,
    _index,
    _info,
    _intervene,
    _list,
    _look,
    _output_score,
    _relations,
    _search,
    _serve,
    _steer,
    _trace,
    _track,
    _train,
    _vector,
    _verify,
)

app = typer.Typer(
    name="gemscope",
    help="The open workbench for Gemma Scope: load, run, evaluate and train sparse dictionaries.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(_demo.demo)
app.command("eval")(_eval.evaluate_command)
app.command("check")(_check.check_command)
app.command("look")(_look.look)
app.command("info")(_info.info)
app.command("list")(_list.list_command)
app.command("download")(_download.download)
app.command("convert")(_convert.convert)
app.command("index")(_index.index_command)
app.command("feature")(_feature.feature_command)
app.command("search")(_search.search_command)
app.command("explain")(_explain.explain_command)
app.command("compare")(_compare.compare_command)
app.command("relations")(_relations.relations_command)
app.command("track")(_track.track_command)
app.command("cluster")(_cluster.cluster_command)
app.add_typer(_catalog.catalog, name="catalog")
app.command("verify")(_verify.verify_command)
app.command("serve")(_serve.serve_command)
app.command("export-site")(_export_site.export_site_command)
app.command("steer")(_steer.steer_command)
app.command("dose")(_dose.dose_command)
app.command("output-score")(_output_score.output_score_command)
app.command("intervene")(_intervene.intervene_command)
app.command("trace")(_trace.trace_command)
app.command("circuit")(_circuit.circuit_command)
app.command("heads")(_heads.heads_command)
app.command("graph")(_graph.graph_command)
app.command("vector")(_vector.vector_command)
app.command("train")(_train.train_command)
app.command("harvest")(_harvest.harvest_command)
app.command("doctor")(_doctor.doctor)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code: 0, 2 for a user's mistake, 130 or 143 when stopped."""
    try:
        app(arguments, prog_name="gemscope")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except InputError as mistake:
        print(f"gemscope: {mistake}", file=sys.stderr)
        return 2
    return 0
