"""The leaderboard as pages and figures."""
