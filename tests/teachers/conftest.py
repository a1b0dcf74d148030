"""A chat server that fails on command, and the key that it must never give away."""

import pytest
from chat_server import ChatServer
from teachers.asked import KEY


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", KEY)
  with ChatServer() as listening:
    yield listening
