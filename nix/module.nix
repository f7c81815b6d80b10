# services.narseal. The settings are those of narseal.toml; docs/operating.md has each of them.
self:
{ config, lib, pkgs, ... }:

let
  cfg = config.services.narseal;
  inherit (lib) mkEnableOption mkIf mkOption types;

  # what TOML can hold
  value = types.nullOr (types.oneOf [
    types.bool
    types.int
    types.float
    types.str
    (types.listOf value)
    (types.attrsOf value)
  ]) // { description = "TOML value"; };

  # inline tables throughout; JSON's strings and numbers are TOML's too
  toTOML = v:
    if builtins.isAttrs v then
      "{ ${lib.concatStringsSep ", " (lib.mapAttrsToList (k: x: "${builtins.toJSON k} = ${toTOML x}") v)} }"
    else if builtins.isList v then "[ ${lib.concatMapStringsSep ", " toTOML v} ]"
    else builtins.toJSON v;

  settings = lib.filterAttrsRecursive (_: v: v != null) cfg.settings;
  text = lib.concatStrings (lib.mapAttrsToList (k: v: "${builtins.toJSON k} = ${toTOML v}\n") settings);
  file = pkgs.writeText "narseal.toml" text;

  upstream = types.submodule {
    freeformType = types.attrsOf value;
    options = {
      url = mkOption {
        type = types.str;
        example = "https://cache.nixos.org";
        description = "The binary cache: http(s):// or file://.";
      };
      public_keys = mkOption {
        type = types.listOf types.str;
        default = [ ];
        description = "The keys of this upstream, as in trusted-public-keys.";
      };
      verify = mkOption {
        type = types.enum [ "signature" "content" "bundle" ];
        default = "signature";
        description = "What makes a path of this upstream good.";
      };
      priority = mkOption {
        type = types.int;
        default = 40;
        description = "Lower is asked first.";
      };
    };
  };

  signingKey = types.submodule {
    freeformType = types.attrsOf value;
    options.url = mkOption {
      type = types.strMatching "(file|agent|pkcs11):.+";
      description = "Where the secret key is; `file:$CREDENTIALS_DIRECTORY/NAME` with signKeyPaths.";
    };
  };
in
{
  options.services.narseal = {
    enable = mkEnableOption "narseal, a verifying and countersigning binary cache proxy";

    package = mkOption {
      type = types.package;
      default = self.packages.${pkgs.stdenv.hostPlatform.system}.narseal;
      defaultText = lib.literalExpression "narseal from its flake";
      description = "The narseal to run.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Open the port that settings.listen names.";
    };

    signKeyPaths = mkOption {
      type = types.listOf (types.pathWith { inStore = false; absolute = true; });
      default = [ ];
      example = [ "/var/lib/secrets/cache.example.org-1.secret" ];
      description = "Secret key files outside the store; systemd hands them to narseal as credentials.";
    };

    settings = mkOption {
      default = { };
      description = "narseal.toml.";
      type = types.submodule {
        freeformType = types.attrsOf value;
        options = {
          listen = mkOption {
            type = types.str;
            default = "127.0.0.1:8080";
            description = "host:port, unix:/path, or systemd for socket activation.";
          };
          workers = mkOption {
            type = types.ints.positive;
            default = 1;
            description = "Processes on one port.";
          };
          priority = mkOption {
            type = types.ints.unsigned;
            default = 30;
            description = "Of narseal among a client's substituters; lower is asked first.";
          };
          upstream = mkOption {
            type = types.listOf upstream;
            default = [ ];
            description = "The caches that narseal stands in front of.";
          };
          signing.key = mkOption {
            type = types.listOf signingKey;
            default = [ ];
            description = "The operator's keys; signKeyPaths are added.";
          };
        };
      };
    };

    configText = mkOption {
      type = types.str;
      readOnly = true;
      internal = true;
      default = text;
      description = "The configuration file that follows from settings.";
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.settings.signing.key != [ ];
        message = "services.narseal: name a key in signKeyPaths, or in settings.signing.key.";
      }
      {
        assertion = cfg.openFirewall -> builtins.match ".*:[0-9]+" cfg.settings.listen != null;
        message = "services.narseal.openFirewall: settings.listen has no port.";
      }
    ] ++ map
      (u: {
        assertion = u.verify != "signature" || u.public_keys != [ ];
        message = "services.narseal: the upstream ${u.url} has no public_keys.";
      })
      cfg.settings.upstream;

    services.narseal.settings.signing.key = map
      (path: { url = "file:$CREDENTIALS_DIRECTORY/${baseNameOf path}"; })
      cfg.signKeyPaths;

    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall [
      (lib.toInt (lib.last (lib.splitString ":" cfg.settings.listen)))
    ];

    systemd.services.narseal = {
      description = "narseal, a verifying and countersigning Nix binary cache proxy";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];
      serviceConfig = {
        Type = "notify";
        ExecStartPre = "${cfg.package}/bin/narseal check-config --config ${file}";
        ExecStart = "${cfg.package}/bin/narseal serve --config ${file}";
        ExecReload = "/bin/sh -c 'kill -HUP $MAINPID'";
        Restart = "on-failure";
        TimeoutStopSec = 90;
        DynamicUser = true;
        StateDirectory = "narseal";
        RuntimeDirectory = "narseal";
        LoadCredential = map (path: "${baseNameOf path}:${path}") cfg.signKeyPaths;
        LimitNOFILE = 65536;
        LimitCORE = 0;
        UMask = "0077";
        ProtectSystem = "strict";
        ProtectHome = true;
        ProtectKernelTunables = true;
        ProtectKernelModules = true;
        ProtectKernelLogs = true;
        ProtectControlGroups = true;
        ProtectClock = true;
        ProtectHostname = true;
        ProtectProc = "invisible";
        ProcSubset = "pid";
        PrivateTmp = true;
        PrivateDevices = true;
        PrivateUsers = true;
        NoNewPrivileges = true;
        CapabilityBoundingSet = "";
        RestrictAddressFamilies = [ "AF_INET" "AF_INET6" "AF_UNIX" ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        RemoveIPC = true;
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = [ "@system-service" "~@privileged" "~@resources" "setrlimit" "prlimit64" ];
      };
    };
  };
}
