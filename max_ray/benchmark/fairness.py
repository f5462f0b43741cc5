"""How API keys share a worker group: `python -m max_ray.benchmark.fairness` prints the tables of a report.

    flood         time to first token of one key while another one sends as usual, and while it floods
    shares        KV-block-seconds of keys that all want more than there is, against their weights
    Retry-After   what refused requests were told, against when the queue had room for them

On the simulation's virtual clock, with the real scheduler and KV manager.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from max_ray.benchmark.fairness_simulation import Clients, Job, Machine, Simulation
from max_ray.errors import QueueFullError
from max_ray.scheduler import SchedulerLimits

WARM_UP_S = 5.0


def quantile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def around(draw: random.Random, mean: int) -> int:
    """A number from half of `mean` to one and a half times as much."""
    return draw.randint(max(1, mean // 2), max(1, mean * 3 // 2))


def ttft_beside(
    num_others: int, prompt_length: int, num_clients: int, seconds: float, machine: Machine | None = None
) -> list[float]:
    """Times to first token of one key, in seconds.

    Args:
        num_others: Clients of another key, who pause for nothing.
        prompt_length: Of their prompts, in tokens, on average.
        num_clients: Clients of the key, who pause for 0.3 s on average.
        seconds: Length of the run.
        machine: What is simulated.
    """
    draw = random.Random(f"{num_others} {prompt_length} {num_clients}")
    simulation = Simulation(machine or Machine())
    Clients(simulation, lambda: Job("other", around(draw, prompt_length), around(draw, 128)), num_others)
    Clients(
        simulation,
        lambda: Job("key", around(draw, 256), around(draw, 64)),
        num_clients,
        lambda: draw.expovariate(1 / 0.3),
    )
    simulation.run(WARM_UP_S + seconds)
    jobs = [job for job in simulation.done if job.tenant == "key" and job.arrival > WARM_UP_S]
    return [job.first_token - job.arrival for job in jobs if job.first_token is not None]


def shares_of(
    weights: Mapping[str, float], sizes: Mapping[str, tuple[int, int]], seconds: float, machine: Machine | None = None
) -> dict[str, float]:
    """What each key got of the KV-block-seconds, over what its weight entitles it to.

    Args:
        weights: By key.
        sizes: Mean tokens of a prompt and of an answer, by key.
        seconds: Length of the run.
        machine: What is simulated.
    """
    draw = random.Random(f"{weights} {sizes}")
    simulation = Simulation(machine or Machine())
    for key in weights:
        Clients(
            simulation,
            lambda key=key: Job(key, around(draw, sizes[key][0]), around(draw, sizes[key][1]), weights[key]),  # type: ignore[misc]
            40,
        )
    simulation.run(WARM_UP_S * 2)
    simulation.block_seconds.clear()
    simulation.run(WARM_UP_S * 2 + seconds)
    whole, entitled = sum(simulation.block_seconds.values()), sum(weights.values())
    return {key: simulation.block_seconds[key] / whole * entitled / weights[key] for key in weights}


@dataclass
class Refusal:
    """A refused request.

    Args:
        at: When.
        told_s: Its Retry-After.
        needed: Requests and tokens that the queue had lost, or has to lose, when there is room for it.
        truth_s: Seconds after which there was room.
    """

    at: float
    told_s: float
    needed: tuple[int, int]
    truth_s: float | None = None


class RefusedClients:
    """Requests in bursts. Each refused one comes back when it was told to.

    Args:
        simulation: Where they send to.
        prompt_length: Mean tokens of a prompt.
        num_new: Mean tokens of an answer.

    Attributes:
        refusals: All of them.
        num_first_retries: First retries, by whether they were accepted.
    """

    def __init__(self, simulation: Simulation, prompt_length: int, num_new: int, draw: random.Random) -> None:
        self.refusals: list[Refusal] = []
        self.num_first_retries = {True: 0, False: 0}
        self._simulation = simulation
        self._prompt_length, self._num_new, self._draw = prompt_length, num_new, draw
        self._accepted = [0, 0]

    def burst(self, num_requests: int) -> None:
        """So many requests at once."""
        for _ in range(num_requests):
            self._send(Job("key", around(self._draw, self._prompt_length), around(self._draw, self._num_new)), 0)

    def look(self) -> None:
        """Notes which refused requests there would be room for now. To be called often."""
        left = self._left()
        for refusal in self.refusals:
            if refusal.truth_s is None and left[0] >= refusal.needed[0] and left[1] >= refusal.needed[1]:
                refusal.truth_s = self._simulation.now - refusal.at

    def _left(self) -> tuple[int, int]:
        """Requests and tokens that have left the queue in all."""
        queues = self._simulation.scheduler.queues
        return self._accepted[0] - len(queues.waiting), self._accepted[1] - queues.num_waiting_tokens

    def _send(self, job: Job, num_tries: int) -> None:
        now = self._simulation.now
        try:
            self._simulation.submit(job)
        except QueueFullError as error:
            self.refusals.append(Refusal(now, error.retry_after, self._needed(job)))
            self._simulation.at(now + error.retry_after, lambda: self._send(job, num_tries + 1))
        else:
            self._accepted[0] += 1
            self._accepted[1] += job.prompt_length
        if num_tries == 1:
            self.num_first_retries[job.request is not None] += 1

    def _needed(self, job: Job) -> tuple[int, int]:
        """What must have left: enough for this request, behind those that will come back earlier."""
        simulation, now = self._simulation, self._simulation.now
        limits, queues, left = simulation.machine.limits, simulation.scheduler.queues, self._left()
        earlier = sum(refusal.at + refusal.told_s > now for refusal in self.refusals)
        num_places = max(0, limits.max_batch_size - len(queues.running))
        requests = len(queues.waiting) + 1 + earlier - limits.max_queued_requests - num_places
        tokens = -1
        if limits.max_queued_tokens is not None:
            tokens = queues.num_waiting_tokens + job.prompt_length + earlier * self._prompt_length
            tokens -= limits.max_queued_tokens
        return left[0] + requests, left[1] + tokens


def retry_after(limits: SchedulerLimits, size: tuple[int, int], burst: int, num_bursts: int) -> RefusedClients:
    """Bursts of requests that the queue cannot hold, until each one was served. A first one that fits warms up.

    Args:
        limits: Of the scheduler.
        size: Mean tokens of a prompt and of an answer.
        burst: Requests of a burst.
        num_bursts: Bursts, 20 s apart.
    """
    simulation = Simulation(replace(Machine(), limits=limits))
    clients = RefusedClients(simulation, *size, random.Random(f"{size} {burst}"))
    num_warm_up = limits.max_batch_size
    simulation.at(0.1, lambda: clients.burst(num_warm_up))
    for number in range(num_bursts):
        simulation.at(10.0 + number * 20.0, lambda: clients.burst(burst))
    while len(simulation.done) < num_warm_up + burst * num_bursts and simulation.now < 20.0 * num_bursts + 300:
        simulation.run(simulation.now + 0.02)
        clients.look()
    return clients


def flood_table() -> None:
    """Prints the table of the flood."""
    print("| other key sends | prompts | clients of the key | TTFT p50, ms | p99, ms | p99 over alone | over usual |")
    print("|---|---|---|---|---|---|---|")
    for prompt_length in (256, 4000):
        for num_clients in (1, 8):
            seen: list[float] = []
            for name, num_others in (("nothing", 0), ("as usual, 16 clients", 16), ("a flood, 500 clients", 500)):
                times = ttft_beside(num_others, prompt_length, num_clients, 60.0)
                p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
                ratios = " | ".join([*(f"{p99 / earlier:.2f}" for earlier in seen[:2]), "", ""][:2])
                seen.append(p99)
                print(f"| {name} | {prompt_length} | {num_clients} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f} | {ratios} |")


def shares_table() -> None:
    """Prints the table of the shares."""
    print("| weights | mean prompt + answer, tokens | KV blocks | share over weight, worst |")
    print("|---|---|---|---|")
    same, mixed = (256, 128), [(2000, 50), (100, 400), (256, 128)]
    for weights, sizes, num_blocks in (
        ((1, 1), [same] * 2, 2000),
        ((1, 2, 4), [same] * 3, 2000),
        ((1, 2, 4), mixed, 2000),
        ((1, 1), mixed[:2], 1000),
    ):
        keys = [f"key {number}" for number in range(len(weights))]
        machine = Machine(num_blocks=num_blocks)
        result = shares_of(dict(zip(keys, weights, strict=True)), dict(zip(keys, sizes, strict=True)), 120.0, machine)
        worst = max(result.values(), key=lambda ratio: abs(ratio - 1))
        print(f"| {weights} | {', '.join(f'{p}+{n}' for p, n in sizes)} | {num_blocks} | {worst:.3f} |")


def retry_table() -> None:
    """Prints the table of Retry-After."""
    print("| queue | burst | refused | within a factor of 2 | accepted at the first retry |")
    print("|---|---|---|---|---|")
    for limits, size, burst in (
        (SchedulerLimits(32, 2048, 32, 1), (256, 256), 200),
        (SchedulerLimits(32, 2048, 32, 1), (1000, 64), 200),
        (SchedulerLimits(32, 2048, 512, 1, max_queued_tokens=8192), (512, 256), 200),
    ):
        clients = retry_after(limits, size, burst, 3)
        good, retries = share_within(clients.refusals), clients.num_first_retries
        queue = f"{limits.max_queued_requests} requests"
        queue += f", {limits.max_queued_tokens} tokens" if limits.max_queued_tokens else ""
        accepted = retries[True] / max(1, sum(retries.values()))
        print(f"| {queue} | {burst} of {size[0]}+{size[1]} | {len(clients.refusals)} | {good:.0%} | {accepted:.0%} |")


def share_within(refusals: list[Refusal], factor: float = 2.0) -> float:
    """The share of refused requests whose Retry-After was right within a factor."""
    good = [r for r in refusals if r.truth_s is not None and 1 / factor <= r.told_s / max(r.truth_s, 1.0) <= factor]
    return len(good) / len(refusals)


def main() -> None:
    """Prints all tables."""
    for table in (flood_table, shares_table, retry_table):
        table()
        print(flush=True)


if __name__ == "__main__":
    main()
