"""`make gpu`: tests and measurements of one GPU in one visit of less than nine minutes, none of which can be lost.

    python -m max_ray.benchmark.gpu --results FOLDER [--rehearse]

| module       | what                                                                                  |
|--------------|---------------------------------------------------------------------------------------|
| __main__     | the visit: runs the steps in order and prints what came of each                       |
| steps        | the steps: order, commands, limits                                                    |
| supervisor   | one process of a step: its limit, its output, its next start after a crash            |
| machine      | step `machine`: versions, the device, its memory                                      |
| probe        | step `probe`: products by rows, gaps between kernels, attention by shape, experts      |
| serving_loop | step `loop`: the product's own loop over a worker in this process                     |
| profile      | step `profile`: device time by kernel over a few steps                                |

Needs torch, triton, transformers and pytest; neither Ray, pydantic nor FastAPI.
"""
