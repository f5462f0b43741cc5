"""dspy."""

from __future__ import annotations

from typing import Literal

import dspy
from dspy.utils.exceptions import AdapterParseError

from tests.clients.harness import MODEL, OPENAI_URL, ClientCalls, call


class DSPy(ClientCalls):
    client = "dspy"

    def setUp(self) -> None:
        super().setUp()
        self.lm = dspy.LM(f"openai/{MODEL}", api_base=OPENAI_URL, api_key="-", max_tokens=120, cache=False)

    @call("LM", "text")
    def test_lm(self) -> None:
        (answer,) = self.lm("Say hello.")
        self.check_text(answer["text"] if isinstance(answer, dict) else answer)

    @call("Predict (falls back to JSON)", "a field of the signature; the format is the model's, so its parse may fail")
    def test_predict(self) -> None:
        signature = dspy.Signature({"question": (str, dspy.InputField()), "answer": (bool, dspy.OutputField())})
        with dspy.context(lm=self.lm):
            try:
                self.assertIsInstance(dspy.Predict(signature)(question="Is Paris a capital?").answer, bool)
            except AdapterParseError as error:
                self.assertIn("parse", str(error))

    @call("Predict with JSONAdapter", "as above: dspy sends no schema to a model that it does not know")
    def test_json(self) -> None:
        country = Literal["France", "Italy", "Norway"]
        signature = dspy.Signature({"city": (str, dspy.InputField()), "country": (country, dspy.OutputField())})
        with dspy.context(lm=self.lm, adapter=dspy.JSONAdapter()):
            try:
                self.assertIn(dspy.Predict(signature)(city="Paris").country, ("France", "Italy", "Norway"))
            except AdapterParseError as error:
                self.assertIn("parse", str(error))
