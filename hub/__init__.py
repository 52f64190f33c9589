"""The maintainers' tools for weights on the Hub: build, publish, verify, import-naver."""
