"""`python -m bench`: the measurements of this machine that README quotes, and the quote."""

from bench import cpu, figures, inspector

if __name__ == "__main__":
    inspector.main()
    cpu.main()
    figures.main()
