"""As much of Ray as `rl.cluster` uses, in this process: calls happen when somebody waits for them,
and a test says which processes die, and when. For supervision without processes.
"""

import importlib.machinery
import types


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Call:
    """A call that was made; `happen` makes it."""

    def __init__(self, actor, method, args):
        self.actor, self.method, self.args, self.value = actor, method, args, None
        self.happened = False

    def happen(self):
        if self.happened or self.actor.hangs:
            return self.happened
        self.happened = True
        try:
            if self.actor.dies():
                raise RayActorError("the process died")
            self.value = getattr(self.actor.made(), self.method)(*self.args)
        except RayActorError as error:
            self.value = error
        except Exception as error:
            self.value = RayTaskError(error)
        return True


class Actor:
    """dead: killed, or by the word of `fate`, which is asked before each call."""

    def __init__(self, ray, cls, args):
        self.ray, self.cls, self.args = ray, cls, args
        self.object, self.dead, self.hangs, self.calls = None, False, False, []
        ray.actors.append(self)

    def __getattr__(self, method):
        def remote(*args):
            call = Call(self, method, [resolved(x) for x in args])
            self.calls.append(call)
            return call

        return types.SimpleNamespace(remote=remote)

    def dies(self):
        if not self.dead:
            self.dead = self.ray.fate(self)
        return self.dead

    def made(self):
        if self.object is None:
            self.object = self.cls(*[resolved(x) for x in self.args])
        return self.object

    def run(self, call):
        """Whether a call has happened, after those before it."""
        while self.calls and not call.happened:
            if not self.calls[0].happen():
                return False
            self.calls.pop(0)
        return call.happened


class Put:
    def __init__(self, value):
        self.value = value


def resolved(x):
    return x.value if isinstance(x, Put) else x


class FakeRay(types.ModuleType):
    """fate: whether an actor dies now. There is room for as many CPUs as `cpus`."""

    def __init__(self, fate=lambda actor: False, cpus=8):
        super().__init__("ray")
        self.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        self.fate, self.cpus, self.actors, self.began = fate, cpus, [], []
        self.exceptions = types.SimpleNamespace(
            RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError
        )

    def is_initialized(self):
        return bool(self.began)

    def init(self, **options):
        self.began.append(options)

    def shutdown(self):
        self.began.clear()

    def cluster_resources(self):
        return {"CPU": self.cpus}

    def put(self, value):
        return Put(value)

    def remote(self, cls):
        make = types.SimpleNamespace(remote=lambda *args: Actor(self, cls, args))
        return types.SimpleNamespace(options=lambda **options: make)

    def wait(self, calls, *, num_returns, timeout):
        ready = [call for call in calls if call.actor.run(call)]
        return ready[:num_returns], []

    def get(self, call, timeout=None):
        assert call.actor.run(call)
        if isinstance(call.value, Exception):
            raise call.value
        return call.value

    def kill(self, actor):
        actor.dead = True
