"""What a training run leaves behind, and what is made of it.

One run writes one record (`records`; `environment` says where it ran), a sweep starts many runs
(`sweep`), `stats` turns records into figures with an uncertainty and `leaderboard` into a page.
"""
