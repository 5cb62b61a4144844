"""`python -m bench`: the measurements of this machine that README quotes."""

from bench import cpu, inspector

if __name__ == "__main__":
    inspector.main()
    cpu.main()
