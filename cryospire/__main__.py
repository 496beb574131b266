from cryospire.cli import main

main()
