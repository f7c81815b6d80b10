{ lib, python3Packages }:

python3Packages.buildPythonApplication {
  pname = "narseal";
  version = builtins.head (builtins.match ".*__version__ = \"([^\"]+)\".*"
    (builtins.readFile ../proxy/narseal/__init__.py));
  pyproject = true;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [ ../proxy ../pyproject.toml ../README.md ../LICENSE ];
  };

  build-system = [ python3Packages.hatchling ];

  dependencies = with python3Packages; [
    aiofiles
    aiohappyeyeballs
    aiohttp
    alembic
    backports-zstd
    brotli
    cel-python
    click
    cryptography
    httptools
    ijson
    jinja2
    prometheus-client
    pydantic
    pydantic-core
    pydantic-settings
    pyjwt
    pynacl
    python-pkcs11
    pyyaml
    requests
    rfc3161-client
    rich
    sigstore
    sqlalchemy
    urllib3
    uvloop
    yarl
  ];

  # they want real Nix, root and Debian's packages: `make test` runs them
  doCheck = false;
  pythonImportsCheck = [ "narseal.cli" ];

  meta = {
    description = "A proxy in front of Nix binary caches that verifies what it serves and countersigns it";
    license = lib.licenses.asl20;
    mainProgram = "narseal";
    platforms = lib.platforms.linux;
  };
}
