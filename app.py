"""Shows the operator and draws samples in a browser, on this machine alone:

    python app.py                                      serves at http://127.0.0.1:7860
    python app.py --folders results runs/elsewhere     checkpoints from there, and from nowhere else

Needs gradio and matplotlib, which `make app` installs (requirements-app.txt).
"""

import argparse
import os
import socket
import time
from pathlib import Path

from machine.flags import not_negative
from machine.precision import allow_tf32
from machine.processes import launch
from pages import operator, samples, two_models
from pages.checkpoints import checkpoints_in

FOLDERS = ("pretrained", "results")


def main(args, processes):
    allow_tf32()  # as sample.py does
    folders = choose_folders(args.folders)
    page, address = serve(folders, processes.device, args.host, args.port)
    print(f"The app is at {address}; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


def choose_folders(given):
    """Returns the folders whose checkpoints may be opened, by default FOLDERS. Says if there is no checkpoint in them;
    ValueError for one that is given and is no folder."""
    if missing := [folder for folder in given or () if not Path(folder).is_dir()]:
        raise ValueError(f"--folders {missing[0]}: there is no such folder")
    if not checkpoints_in(folders := list(given or FOLDERS)):
        print(nothing_in(folders))
    return folders


def nothing_in(folders):
    """Says that there is no checkpoint, and what to do."""
    where = " or ".join(folders)
    return f"There is no checkpoint in {where}: train one with train.py, or give its folder as --folders; page 1 needs none"


def free_port(host, port):
    """Returns the port, or a free one for 0. OSError if the port is in use or not allowed."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
        except (OSError, OverflowError) as error:
            advice = "--port takes another, and with 0 one that is free"
            raise OSError(f"port {port} of {host} is in use or cannot be had ({error}); {advice}") from error
        return server.getsockname()[1]


def serve(folders, device, host, port):
    """Serves the pages in threads of this process. Returns them, Blocks of Gradio, and their address. ValueError if Gradio is
    not installed, OSError if the port cannot be had."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the app needs gradio, which is not installed: pip install -r requirements-app.txt") from error
    port = free_port(host, port)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from the net
    with gr.Blocks(title="PDE-SSM-DiT", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as page:
        visits = []
        with gr.Tab("the operator"):
            visits.append(operator.build())
        for name, build_page in (("samples", samples.build), ("two models", two_models.build)):
            with gr.Tab(name):
                if not checkpoints_in(folders):
                    gr.Markdown(nothing_in(folders))
                visits.append(build_page(folders, device))
        for show, inputs, outputs in visits:
            page.load(show, inputs, outputs, show_progress="hidden")
    how = dict(quiet=True, prevent_thread_lock=True, ssr_mode=False, footer_links=[], theme=theme)
    page.launch(server_name=host, server_port=port, share=False, **how)
    return page, f"http://{host}:{port}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Look at the operator and draw samples, in a browser.")
    add = parser.add_argument
    add("--folders", nargs="+", metavar="FOLDER", help=f"whose checkpoints may be opened; {' and '.join(FOLDERS)} unless given")
    add("--port", type=not_negative, default=7860, help="0 takes one that is free")
    add("--host", default="127.0.0.1", help="address to serve at; the default is for this machine alone")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
