"""Images in prompts: where their bytes come from, decoding them within limits, and resizing them for a model.

Runs in the HTTP replica: Pillow and numpy, no torch. Who writes a vision-language family names `ImageTextTokenizer`
(`max_ray.images.tokenizer`) in the record.
"""
