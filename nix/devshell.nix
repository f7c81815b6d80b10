{ pkgs }:

pkgs.mkShell {
  packages = [ pkgs.python3 pkgs.uv pkgs.cosign pkgs.nginx pkgs.wrk pkgs.prometheus pkgs.strace ];
}
