"""What training costs: `make bench` measures it on this machine and writes results/bench.md."""
