{
  description = "narseal: a proxy in front of Nix binary caches that verifies what it serves and countersigns it";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" ];
      forAllSystems = f: builtins.listToAttrs (map
        (system: { name = system; value = f nixpkgs.legacyPackages.${system}; })
        systems);
    in
    {
      packages = forAllSystems (pkgs: rec {
        narseal = pkgs.callPackage ./nix/package.nix { };
        default = narseal;
      });

      apps = forAllSystems (pkgs: rec {
        narseal = {
          type = "app";
          program = "${self.packages.${pkgs.stdenv.hostPlatform.system}.narseal}/bin/narseal";
        };
        default = narseal;
      });

      nixosModules = rec {
        narseal = import ./nix/module.nix self;
        default = narseal;
      };

      checks = forAllSystems (pkgs: import ./nix/checks.nix { inherit self nixpkgs pkgs; });

      devShells = forAllSystems (pkgs: { default = import ./nix/devshell.nix { inherit pkgs; }; });
    };
}
