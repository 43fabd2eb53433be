from fastflag.cli import main

main()
