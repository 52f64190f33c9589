"""A plain file server on 127.0.0.1, in the place of NAVER's."""

from collections.abc import Mapping
from urllib.parse import unquote

from tests.loopback import Content, Handler, Server

PREFIX = "/ComputerVision/trex_models/"


class FileServer(Server):
    """Serves files, bytes or paths, by name below a prefix."""

    def __init__(self, files: Mapping[str, Content]) -> None:
        super().__init__(FileHandler)
        self.files = dict(files)
        self.ranges = True  # whether it can resume

    @property
    def url(self) -> str:
        """Address of the folder, with a slash at the end as in NAVER's base address."""
        return super().url + PREFIX


class FileHandler(Handler):
    server: FileServer

    def answer(self, path: str) -> None:
        content = self.server.files.get(unquote(path).removeprefix(PREFIX))
        if content is None:
            self.send(404)
        else:
            self.send(200, content, ranges=self.server.ranges)
