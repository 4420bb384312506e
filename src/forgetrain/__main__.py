from forgetrain.cli.main import main

main()
