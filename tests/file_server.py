"""File server on 127.0.0.1 that replaces NAVER's."""

from collections.abc import Mapping
from urllib.parse import unquote

from tests.loopback import Content, Handler, Server

PREFIX = "/ComputerVision/trex_models/"


class FileServer(Server):
    """Serves files, bytes or paths, by name below a prefix."""

    def __init__(self, files: Mapping[str, Content]) -> None:
        super().__init__(FileHandler)
        self.files = dict(files)
        self.ranges = True  # supports resuming

    @property
    def url(self) -> str:
        """URL of the folder, with a trailing slash like NAVER's."""
        return super().url + PREFIX


class FileHandler(Handler):
    server: FileServer

    def answer(self, path: str) -> None:
        content = self.server.files.get(unquote(path).removeprefix(PREFIX))
        if content is None:
            self.send(404)
        else:
            self.send(200, content, ranges=self.server.ranges)
