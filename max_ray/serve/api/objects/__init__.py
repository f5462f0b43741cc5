"""Types of the JSON objects that the routes answer with: what builds an answer is checked against them, and
`/openapi.json` is made from them."""
