"""`max-ray benchmark`: load for any OpenAI-compatible server, and plots of the results. No Ray and no torch here.

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

Measured results are kept in LOG.md beside this file.
"""
