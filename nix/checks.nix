# `nix flake check`: the package builds, and the module evaluates with its types and assertions
# (plain `flake check` does not evaluate a module).
{ self, nixpkgs, pkgs }:

let
  inherit (nixpkgs) lib;
  anything = lib.mkOption { type = lib.types.attrsOf lib.types.anything; default = { }; };
  evaluated = lib.evalModules {
    specialArgs = { inherit pkgs; };
    modules = [
      self.nixosModules.default
      {
        options = {
          assertions = lib.mkOption { type = lib.types.listOf lib.types.attrs; };
          systemd.services = anything;
          networking.firewall = anything;
        };
        config.services.narseal = {
          enable = true;
          openFirewall = true;
          signKeyPaths = [ "/var/lib/secrets/cache.example.org-1.secret" ];
          settings = {
            limits.nar_size = "16G";
            upstream = [{
              url = "https://cache.nixos.org";
              public_keys = [ "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
            }];
          };
        };
      }
    ];
  };
  failed = builtins.filter (a: !a.assertion) evaluated.config.assertions;
in
{
  package = self.packages.${pkgs.stdenv.hostPlatform.system}.default;
  module = pkgs.runCommand "narseal-module"
    {
      settings = evaluated.config.services.narseal.configText;
      unit = builtins.toJSON evaluated.config.systemd.services.narseal.serviceConfig;
      firewall = builtins.toJSON evaluated.config.networking.firewall;
      failed = builtins.toJSON (map (a: a.message) failed);
    } ''
    [ "$failed" = "[]" ] && printf '%s\n%s\n%s\n' "$settings" "$unit" "$firewall" > $out
  '';
}
