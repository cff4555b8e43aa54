from thriftune.cli import main

main()
