"""Tools that build, publish and verify weights on the Hub, and import NAVER's files."""
