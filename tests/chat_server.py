"""An OpenAI-compatible chat server that fails on command: what networked teachers are tested against.

Its "model" judges truthfully: every response in these tests holds a number, and the larger one is better. What it does
with a request is the next fault of its schedule, or a proper answer once the schedule is empty.
"""

import asyncio
import dataclasses
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

TRANSIENT = ("429", "500", "503", "408", "hang", "reset", "cut", "drip")
UNREADABLE = ("garbage", "truncated", "schema", "empty", "null", "waffle")
REFUSALS = ("400", "401", "404", "422")
FAULTS = TRANSIENT + UNREADABLE
PRICE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


@dataclasses.dataclass
class Request:
  """What came in, what was done with it, and whether an answer that costs something went out whole."""

  body: dict[str, Any]
  headers: dict[str, str]
  fault: str | None
  charged: bool = False

  @property
  def content(self) -> str:
    """All that the messages say."""
    return "\n".join(message["content"] for message in self.body["messages"])


def truth(content: str) -> str:
  """What an honest judge (or ranker) says: the response with the larger number is better."""
  ranked = re.findall(
    r"<response number=\"(\d+)\">\s*(.*?)\s*</response>", content.split("Now the one to rank:")[-1], re.S
  )
  if ranked:
    order = sorted(ranked, key=lambda item: -_number(item[1]))
    return " > ".join(f"[{number}]" for number, _ in order)
  first, second = (_number(re.search(rf"<response_{side}>(.*?)</response_{side}>", content, re.S)[1]) for side in "ab")
  return "A" if first > second else "B" if second > first else "C"


def _number(text: str) -> int:
  return int(re.search(r"\d+", text)[0])


def completion(text: str | None, **choice: Any) -> dict[str, Any]:
  """A proper chat completion."""
  message = {"role": "assistant", "content": text}
  choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
  return {"id": "1", "object": "chat.completion", "created": 1, "model": "m-1", "choices": choices, "usage": PRICE}


class ChatServer:
  """Listens while it is open. `faults` is the schedule, `log` what happened, `answer` the model behind it."""

  def __init__(self, answer: Callable[[str], str | dict] = truth, *, retry_after: str = "7"):
    self.answer, self.retry_after = answer, retry_after
    self.faults: list[str] = []
    self.log: list[Request] = []
    self.delay = 0.0  # seconds before a proper answer

  def __enter__(self):
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    start = asyncio.start_server(self._serve, "127.0.0.1", 0)
    self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
    self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
    return self

  def __exit__(self, *exception):
    asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def reset(self, faults: Sequence[str] = ()) -> None:
    """Begins anew, with this schedule."""
    self.faults, self.log = list(faults), []

  @property
  def charged(self) -> list[Request]:
    """Requests that cost something."""
    return [request for request in self.log if request.charged]

  async def _stop(self) -> None:
    self._server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
      task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

  async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
      while request := await self._read(reader):
        self.log.append(request)
        await asyncio.sleep(0 if request.fault else self.delay)
        if not await self._respond(request, writer):
          break
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
      pass
    finally:
      writer.close()

  async def _read(self, reader: asyncio.StreamReader) -> Request | None:
    try:
      head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
      return None
    lines = head.decode().split("\r\n")[1:]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    return Request(body, headers, self.faults.pop(0) if self.faults else None)

  async def _respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Answers as the fault wants; false if the connection is over."""
    fault = request.fault
    if fault == "hang":
      await asyncio.sleep(60)
    elif fault in ("reset", "cut"):
      if fault == "cut":
        await _write(writer, _response(200, _encoded(completion("A")))[:-40])
      # Closing with a linger of 0 sends RST instead of FIN.
      writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      return False
    elif fault == "drip":
      for byte in _response(200, _encoded(completion("A"))):
        await _write(writer, bytes([byte]))
        await asyncio.sleep(0.02)
    elif fault and fault.isdigit():
      await _write(writer, self._error(int(fault), request))
    else:
      await _write(writer, _response(200, self._body(fault, request)))
      request.charged = True
    return True

  def _error(self, status: int, request: Request) -> bytes:
    # As careless servers do, it repeats what it was sent.
    error = {"message": f"no, {status}: {request.headers.get('authorization')}", "type": "t", "code": None}
    return _response(status, _encoded({"error": error}), {"Retry-After": self.retry_after} if status == 429 else {})

  def _body(self, fault: str | None, request: Request) -> bytes:
    if fault == "garbage":
      return b"\x00\xff<html>never mind</html>"
    if fault == "truncated":
      return _encoded(completion("A"))[:60]
    if fault == "schema":
      return _encoded({"choices": {"text": "A"}})
    if fault == "empty":
      return _encoded(completion("A") | {"choices": []})
    if fault == "null":
      return _encoded(completion(None))
    if fault == "waffle":
      return _encoded(completion("A or B? Both have their charm."))
    answer = self.answer(request.content)
    return _encoded(answer if isinstance(answer, dict) else completion(answer))


def _encoded(content: Any) -> bytes:
  return json.dumps(content).encode()


def _response(status: int, body: bytes, headers: dict[str, str] | None = None) -> bytes:
  named = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
  head = f"HTTP/1.1 {status} OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in named.items())
  return head.encode() + b"\r\n" + body


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
  writer.write(data)
  await writer.drain()
