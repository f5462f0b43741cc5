"""`max-ray benchmark`: load for any OpenAI-compatible server and plots of the results; kernels, and whole models with
random weights, in this process. No Ray here; torch only in the last six modules.

| module     | what                                                                             |
|------------|----------------------------------------------------------------------------------|
| command    | flags of the subcommands, and what they call                                     |
| serving    | one run: data, warm-up, load, report                                             |
| datasets   | conversations to send: random, shared-prefix, multi-turn, sharegpt                |
| words      | text of a wanted number of tokens                                                |
| load       | when which request goes out: Poisson arrivals or a fixed number at a time        |
| client     | sends one request and notes the time of every read; parses nothing               |
| stream     | from what was read to tokens, times and failures, after the run                  |
| metrics    | from the results to percentiles, throughput, goodput                             |
| report     | the table, and the JSON file                                                     |
| plot       | several JSON files side by side, as a PNG                                        |
| progress   | the bar on a terminal                                                            |
| kernels, kernel_cases | each kernel against its reference implementation and the machine's ceilings         |
| offline    | decode and prefill rates of a shape against the roofline and a peer              |
| synthetic  | the product's runner over random weights                                         |
| transformers_peer | the peer                                                                  |
| gpu        | the visit of `make gpu`: tests and measurements in bounded steps                 |
| case_log   | results as they come, one a line                                                 |
| timing     | times of device work; copy rate and matmul peak of the machine                   |
| shapes, device_flags, aligned | shapes by name, flags, tables                                 |

Measured results are kept in LOG.md beside this file.
"""
