"""Tests of leakage: what a finished run tells somebody who attacks it of the samples it was trained on.

    attack.py       a run and the names of attacks -> findings, in the run's folder
    membership.py   was this sample trained on?
    canaries.py     has the model learned a secret that a few records hold?
    inversion.py    which sample is this update from?
    seen.py         what the server sees of updates, under the run's own masks and noise
    subject.py      the run as the attacks find it
    scores.py       how well an attack does

An attack that fails proves nothing: a better one may succeed. One that succeeds is a fact.
"""
