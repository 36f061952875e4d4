# Installs Chromium with apt where there is none, and says so where that cannot be done: tests of the page are then skipped.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        echo "the tests of the studio's page use $(command -v "$name")"
        exit 0
    fi
done
apt="apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=120"
if [ "$(id -u)" != 0 ]; then
    apt="sudo -n $apt"
fi
export DEBIAN_FRONTEND=noninteractive
if command -v apt-get >/dev/null && $apt update && $apt install -y --no-install-recommends chromium >/dev/null; then
    echo "installed $(command -v chromium)"
else
    echo "no Chromium here and none could be installed: the tests of the studio's page will be skipped"
fi
