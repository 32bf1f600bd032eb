"""Maps the top-level folders recipes/ and data/ into the package, so that a wheel carries them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["zoo", "zoo.*"]), "zoo._recipes", "zoo._data"],
    package_dir={"zoo._recipes": "recipes", "zoo._data": "data"},
    package_data={
        "zoo": ["py.typed"],
        "zoo.leaderboard.page": ["_html/*"],
        "zoo._recipes": ["**/*.yaml"],
        "zoo._data": ["**/*.yaml", "runs/**/*.json", "bench/*.json"],
    },
)
