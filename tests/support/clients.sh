# Installs what the studio's tests need and pip does not have: Chromium by apt, and OpenAI's client for Node by npm into
# the folder that is given. What cannot be installed is named: its tests are then skipped.
folder=$1
export DEBIAN_FRONTEND=noninteractive
apt="apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=120"
if [ "$(id -u)" != 0 ]; then
    apt="sudo -n $apt"
fi
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
if [ -n "$browser" ]; then
    echo "the tests of the studio's page use $browser"
elif command -v apt-get >/dev/null && $apt update && $apt install -y --no-install-recommends chromium >/dev/null; then
    echo "installed $(command -v chromium)"
else
    echo "no Chromium here and none could be installed: the tests of the studio's page will be skipped"
fi
client=openai@7.57.0
if [ -d "$folder/node_modules/openai" ]; then
    echo "the tests of the studio use OpenAI's client for Node in $folder"
elif command -v npm >/dev/null && npm install --silent --no-audit --no-fund --no-save --prefix "$folder" $client; then
    echo "installed $client for Node in $folder"
else
    echo "no $client for Node here and it could not be installed: its test will be skipped"
fi
