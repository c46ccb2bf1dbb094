from kbit.cli import main

main()
